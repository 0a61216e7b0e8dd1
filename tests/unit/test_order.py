from __future__ import annotations

import numpy as np
import pytest

from ftcore.data.order import Order, deal, step_seed


def test_every_epoch_visits_every_block_once_in_another_order() -> None:
    order = Order(num_blocks=23, batch_size=5, seed=7)
    epochs = [np.concatenate([order.window(e * 5 + i) for i in range(5)]) for e in range(2)]
    assert [sorted(e.tolist()) for e in epochs] == [list(range(23))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(order.window(4)) == 3


@pytest.mark.parametrize("num_blocks", [*range(1, 40), 1000, 4097])
def test_the_windows_of_an_epoch_are_a_shuffle_of_all_blocks(num_blocks: int) -> None:
    order = Order(num_blocks, 8, 3)
    assert sorted(np.concatenate([order.window(i) for i in range(order.steps_per_epoch)]).tolist()) == list(range(num_blocks))


def test_a_place_holds_any_block_equally_often_and_neighbours_are_strangers() -> None:
    seeds, size = 4000, 50
    orders = np.array([Order(size, size, seed).window(0) for seed in range(seeds)])
    counts = np.stack([np.bincount(place, minlength=size) for place in orders.T])
    steps = np.bincount((np.diff(orders, axis=1) % size).ravel(), minlength=size)[1:]
    for seen in (counts.ravel(), steps):  # chi-square over its degrees of freedom: one, give or take what chance allows
        over = ((seen - seen.mean()) ** 2 / seen.mean()).sum() / (len(seen) - 1)
        assert over < 1 + 6 * (2 / len(seen)) ** 0.5, over


def test_a_step_deep_in_an_epoch_of_a_trillion_blocks_is_found_without_making_the_shuffle() -> None:
    order = Order(num_blocks=10**12, batch_size=8, seed=7)
    window = order.window(10**11)
    assert len(set(window.tolist())) == 8 and window.min() >= 0 and window.max() < 10**12
    assert window.max() - window.min() > 10**9


def test_the_order_follows_from_the_seed_and_the_step_alone() -> None:
    assert Order(23, 5, 7).window(11).tolist() == Order(23, 5, 7).window(11).tolist()
    assert Order(23, 5, 7).window(0).tolist() != Order(23, 5, 8).window(0).tolist()


def test_the_run_is_as_long_as_epochs_or_max_steps_say() -> None:
    order = Order(23, 5, 0)
    assert (order.num_steps(2.0, None), order.num_steps(0.5, None), order.num_steps(9.0, 7), order.num_steps(0.01, None)) == (10, 2, 7, 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_a_window_is_dealt_whole_and_evenly(ranks: int) -> None:
    window = np.arange(100, 117)
    sizes = np.random.default_rng(0).integers(5, 50, 17)
    dealt = deal(window, sizes, ranks, micro_batch=2)
    assert sorted(b for rank in dealt for part in rank for b in part) == window.tolist()
    counts = [len(rank) for rank in dealt]
    assert max(counts) - min(counts) <= 1
    assert all(len(part) <= 2 for rank in dealt for part in rank)


def test_blocks_of_like_size_share_a_micro_batch() -> None:
    sizes = np.array([5, 50, 6, 49])
    assert deal(np.arange(4), sizes, 1, 2) == [[[1, 3], [2, 0]]]


def test_steps_ranks_and_seeds_draw_from_different_streams() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 240
    assert all(0 <= seed < 1 << 63 for seed in seeds)
