"""Settings of a server: those of several bases, and what is refused in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ftcore.errors import ConfigError
from serving.settings import settings_of


def test_settings_of_one_base_are_its_own_and_a_name_is_given_once(tmp_path: Path) -> None:
    words = ["base=A", "store=S", "replicas=3", "tool_format=hermes", "bases.mine.base=B", "bases.mine.engine.kind=fake"]
    settings = settings_of(words)
    mine = settings.of("mine")
    assert list(settings.all_bases) == ["base", "mine"] and set(mine.all_bases) == {"base", "mine"}
    assert (mine.base_name, mine.base, mine.engine.kind, mine.replicas.max, mine.tool_format) == ("mine", "B", "fake", 1, "auto")
    assert (mine.store, settings.of("base").replicas.max) == ("S", 3)
    assert settings_of(["base=A", "store=S"]).of("base") == settings_of(["base=A", "store=S"])
    with pytest.raises(ConfigError, match="base is what clients call the first base"):
        settings_of(["base=A", "store=S", "bases.base.base=B"])
    (tmp_path / "serve.yaml").write_text("base: A\nstore: S\nbases:\n  mine:\n    base: B\n    engin: {kind: fake}\n")
    with pytest.raises(ConfigError, match=r"serve.yaml:6  bases\.mine\.engin  unknown key; .* did you mean bases\.mine\.engine\?"):
        settings_of([str(tmp_path / "serve.yaml")])


def test_a_replica_that_ends_has_the_time_it_was_given_and_its_pod_more() -> None:
    from serving.app import application

    for words, seconds in (([], 300), (["drain_s=900"], 900)):
        ingress = application(settings_of(["base=A", "store=S", *words]))._bound_deployment
        engine = ingress.init_args[1]["base"]._bound_deployment
        assert [each._deployment_config.graceful_shutdown_timeout_s for each in (ingress, engine)] == [seconds] * 2
    documents = list(yaml.safe_load_all((Path(__file__).parents[2] / "k8s/base/serve.yaml").read_text()))
    (spec,) = (document["spec"] for document in documents if document["kind"] == "RayService")
    deployments = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    waits = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][3])
    assert {each["graceful_shutdown_timeout_s"] for each in deployments} == {300}
    assert 300 < waits < pod["terminationGracePeriodSeconds"]
