"""The rendered autoscaler runs, as a process."""

from pathlib import Path

from chart_autoscaler import wake_and_sleep
from chart_pods import Pod


async def test_it_wakes_a_stage_and_lets_it_sleep_with_the_rights_it_has(tmp_path: Path) -> None:
    await wake_and_sleep(tmp_path, Pod)
