"""Reads dashboards as Grafana's own types, and says what is lost by that: what Grafana's schema does not know."""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(before, after, path):
    """Yields where something of `before` is missing or different in `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is not in the schema"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after)):
            yield from lost(one, other, f"{path}[{number}]")
    elif before != after:
        yield f"{path} is {before!r}, which becomes {after!r}"


register_default_plugins()
for name in sys.argv[1:]:
    with open(name, encoding="utf-8") as file:
        dashboard = json.load(file)
    read = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    for what in lost(dashboard, read, name.rsplit("/", 1)[-1]):
        print(what)
