"""Limits of control groups, in trees of files as the kernel shows them."""

import pytest

from outsize.store.cgroup import available_bytes, limit_bytes

MIB = 1 << 20
UNLIMITED = 9223372036854771712


def v1(folder, limit, usage, cache=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    stat = f"cache {usage}\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(stat)


def v2(folder, limit, usage, cache=0, high="max"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    stat = f"anon {usage - cache}\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def machine(tmp_path):
    """Writes /proc/self of a process in the groups and mounts given; gives what is available to it."""

    def build(groups, *mounts):
        own = tmp_path / "proc" / "self"
        own.mkdir(parents=True, exist_ok=True)
        (own / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        lines = [f"{30 + i} 25 0:{i} {mount}\n" for i, mount in enumerate(mounts)]
        (own / "mountinfo").write_text("25 1 8:1 / / rw,relatime - ext4 /dev/sda rw\n" + "".join(lines))
        return available_bytes(tmp_path / "proc", tmp_path)

    return build


V1_MOUNT = "/ /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "/ /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def test_the_least_of_all_limits_on_the_way_up_counts(machine, tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    v1(top, UNLIMITED, 900 * MIB)
    v1(top / "slurm", 500 * MIB, 300 * MIB)
    v1(top / "slurm/job", 2000 * MIB, 100 * MIB)
    v1(top / "other", 1 * MIB, 0)
    groups = ["9:cpu,cpuacct:/", "4:memory:/slurm/job", "0::/"]
    assert machine(groups, "/ /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct", V1_MOUNT) == 200 * MIB
    v1(top / "slurm/job", 150 * MIB, 100 * MIB)
    assert machine(groups, V1_MOUNT) == 50 * MIB


def test_the_limit_is_the_lowest_on_the_way_up_whatever_is_used(machine, tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    machine(["0::/job.slice/step"], V2_MOUNT)
    assert limit_bytes(tmp_path / "proc", tmp_path) is None
    v2(top / "job.slice/step", 900 * MIB, 100 * MIB)
    v2(top / "job.slice", 700 * MIB, 690 * MIB)
    v2(top / "other.slice", 1 * MIB, 0)
    assert limit_bytes(tmp_path / "proc", tmp_path) == 700 * MIB
    v2(top / "job.slice", "max", 690 * MIB, high=500 * MIB)
    assert limit_bytes(tmp_path / "proc", tmp_path) == 500 * MIB


def test_the_unified_hierarchy_says_max_and_has_a_second_limit(machine, tmp_path):
    top = tmp_path / "sys/fs/cgroup"
    v2(top / "user.slice/run-1.scope", "max", 100 * MIB)
    assert machine(["0::/user.slice/run-1.scope"], V2_MOUNT) is None
    v2(top / "user.slice", 400 * MIB, 250 * MIB)
    assert machine(["0::/user.slice/run-1.scope"], V2_MOUNT) == 150 * MIB
    v2(top / "user.slice/run-1.scope", "max", 100 * MIB, high=130 * MIB)
    assert machine(["0::/user.slice/run-1.scope"], V2_MOUNT) == 30 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_can_be_had_back(version, machine, tmp_path):
    if version == 1:
        v1(tmp_path / "sys/fs/cgroup/memory/job", 1000 * MIB, 990 * MIB, cache=600 * MIB)
        assert machine(["4:memory:/job"], V1_MOUNT) == 610 * MIB
    else:
        v2(tmp_path / "sys/fs/cgroup/job", 1000 * MIB, 990 * MIB, cache=600 * MIB)
        assert machine(["0::/job"], V2_MOUNT) == 610 * MIB


def test_a_group_over_its_limit_has_nothing_left(machine, tmp_path):
    v1(tmp_path / "sys/fs/cgroup/memory/job", 100 * MIB, 120 * MIB)
    assert machine(["4:memory:/job"], V1_MOUNT) == 0


@pytest.mark.parametrize(
    ("group", "mounted", "folder"),
    [
        ("/docker/abc", "/docker/abc", ""),  # the container's own part is mounted
        ("/docker/abc/inner", "/docker/abc", "inner"),
        ("/", "/", ""),  # in a namespace of its own
        ("/../other", "/", ""),  # a group that was left
        ("/docker/abc", "/elsewhere", ""),
    ],
)
def test_a_container_sees_its_own_part(group, mounted, folder, machine, tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    v1(top / folder, 100 * MIB, 40 * MIB)
    mount = f"{mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    assert machine([f"4:memory:{group}"], mount) == 60 * MIB


def test_both_versions_may_be_mounted(machine, tmp_path):
    v1(tmp_path / "sys/fs/cgroup/memory/job", 100 * MIB, 40 * MIB)
    (tmp_path / "sys/fs/cgroup/unified/job").mkdir(parents=True)
    mount = "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    assert machine(["4:memory:/job", "0::/job"], mount, V1_MOUNT) == 60 * MIB


def test_a_mount_point_may_have_white_space(machine, tmp_path):
    v1(tmp_path / "my groups/job", 100 * MIB, 40 * MIB)
    mount = r"/ /my\040groups rw - cgroup cgroup rw,memory"
    assert machine(["4:memory:/job"], mount) == 60 * MIB


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    assert available_bytes(tmp_path / "proc", tmp_path) is None
