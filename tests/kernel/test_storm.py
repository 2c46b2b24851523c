"""A workload that crashes all the time costs the others nothing, and what was refused is told."""

import json
import shutil

from tests.support import s3
from tests.support.collector import running, wait_until

DROPPED = 'core_dump_dumps_dropped_total{reason="rate_limit"}'


def test_noisy_workload_is_suppressed_and_told_once_and_the_quiet_one_is_kept(
    node, seaweed, bucket, tmp_path
):
    quiet = shutil.copy(node.program, node.directory / "quiet")
    with running(node.watch_dir, seaweed.environ(), tmp_path) as collector:
        with node.installed(RATE_LIMIT="2/5"):
            for _ in range(6):
                node.crash()
            node.crash(program=quiet)
        wait_until(lambda: collector.metric(DROPPED) == 4, 20)
        wait_until(lambda: any("storm-" in key for key in s3.keys_in(bucket)), 40, "the record of the storm")
        wait_until(lambda: node.names() == [], 20)
    keys = [key for key in s3.keys_in(bucket) if node.is_ours(key.rpartition("/")[2].removesuffix(".json"))]
    dumps = [json.loads(s3.body_of(bucket, key + ".json")) for key in keys if key.endswith(".gz")]
    assert sorted(told["exe"] for told in dumps) == sorted([str(node.program)] * 2 + [str(quiet)])
    (storm,) = [json.loads(s3.body_of(bucket, key)) for key in keys if "storm-" in key]
    assert (storm["state"], storm["exe"], storm["signal"]) == ("suppressed", str(node.program), 11)
    assert (storm["kept"], storm["suppressed"], storm["reason"]) == (2, 4, "rate_limit")
    assert storm["first"] <= storm["last"] < storm["first"] + 5
    assert len(keys) == 2 * 3 + 1
