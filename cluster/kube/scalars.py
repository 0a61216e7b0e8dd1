"""Scalars: how kubectl's YAML reads a word without quotes, where PyYAML reads it otherwise.

In: a stream of YAML. Out: nodes and values of plain types. Runs in: a terminal; imports no ray.

    1e-4    a number (PyYAML: text)      08       the number 8 (PyYAML: text)      y, n     booleans (PyYAML: text)
    12:30   text (PyYAML: 750)           0o17     the number 15 (PyYAML: text)     a date   text (PyYAML: a date)
    =       text (PyYAML: an error)

From the rules of kubectl's parser (sigs.k8s.io/yaml, goyaml.v2): a label or an environment variable `1e-4` is refused by the API server.
"""

from __future__ import annotations

import re

import yaml

PREFIX = "tag:yaml.org,2002:"
REPLACED = ("timestamp", "int", "float", "bool", "value")
DIGITS = "0123456789"
INT = r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)"
FLOAT = r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
BOOL = r"y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON|n|N|no|No|NO|false|False|FALSE|off|Off|OFF"


class Loader(yaml.SafeLoader):
    bool_values = {**yaml.SafeLoader.bool_values, "y": True, "n": False}  # noqa: RUF012 (PyYAML asks the class)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(PREFIX) not in REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# In this order: a word that could be both is a whole number.
for name, pattern, firsts in (("int", INT, "+-" + DIGITS), ("float", FLOAT, "+-." + DIGITS), ("bool", BOOL, "yYnNtTfFoO")):
    Loader.add_implicit_resolver(PREFIX + name, re.compile(f"^(?:{pattern})$"), list(firsts))
