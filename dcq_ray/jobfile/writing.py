"""A job back to YAML, as `job.yaml` in a run directory keeps it."""

from __future__ import annotations

from typing import Any

import yaml

from dcq_ray.jobfile.mistakes import mask_credentials
from dcq_ray.spec import Job


class _Dumper(yaml.SafeDumper):
    """Writes a value in full wherever it stands, and lists of plain values on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    on_one_line = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=on_one_line)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes these line breaks as they are in its other styles, and reads them as spaces.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def job_yaml(job: Job) -> str:
    """The job with all its defaults as YAML, in the order of the models.

    It loads back to an equal job, but for credentials in URIs, which become `***`.
    """
    values = _writable(job.model_dump(mode="json"))
    written: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1_000_000
    )
    return written


def _writable(value: Any) -> Any:
    """Without credentials, and with `${` escaped, so that nothing is expanded when it is read again."""
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_writable(item) for item in value]
    return mask_credentials(value).replace("${", "$${") if isinstance(value, str) else value
