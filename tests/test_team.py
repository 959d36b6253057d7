"""The processes of a job know when one of them does not come, has failed, or gives no sign of life."""

import logging
import os
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import free_port

from prunenet.runtime import team
from prunenet.runtime.failures import PeerFailed
from prunenet.runtime.team import Team, gather_processes, own_device


@pytest.fixture
def job(monkeypatch):
    """The environment of rank 0 of two, without torchrun's agent; waiting is short."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": free_port()}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"_MEETING": 0.6, "_PATIENCE": 0.1, "TICK": 0.02, "GRACE": 0.3}.items():
        monkeypatch.setattr(team, name, value)
    monkeypatch.setattr(team, "_TRY", timedelta(seconds=0.2))
    monkeypatch.setattr(team, "_server", None)
    yield
    team._server = None


@pytest.fixture
def store(job) -> dist.TCPStore:
    port = int(os.environ["MASTER_PORT"])
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_a_process_that_does_not_come_is_named_soon_and_given_up_in_time(job, caplog):
    caplog.set_level(logging.WARNING)
    start = time.monotonic()
    with pytest.raises(PeerFailed, match="process 1 of this job has not come within") as failed:
        gather_processes()
    assert time.monotonic() - start < 5
    assert f"cannot reach 127.0.0.1:{os.environ['MASTER_PORT']}; start all again" in str(
        failed.value
    )
    assert [record.message for record in caplog.records] == [
        f"waiting for process 1 of this job at 127.0.0.1:{os.environ['MASTER_PORT']}"
    ]


def test_a_store_that_nobody_serves_is_given_up_in_time(job, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PeerFailed, match="process 0, 1 of this job has not come within"):
        gather_processes()


def test_processes_meet_whoever_comes_first_and_a_later_job_does_not_meet_the_last_one(
    job, monkeypatch, caplog
):
    monkeypatch.setattr(team, "_MEETING", 20)
    for prefix in ("a", "b"):
        teams = [Team(rank, 2, prefix) for rank in range(2)]
        second = threading.Thread(target=teams[1].gather)
        second.start()
        if team._server is None:
            time.sleep(0.5)  # which it waits for the store
            port = int(os.environ["MASTER_PORT"])
            team._server = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True
            )
        assert second.is_alive()
        teams[0].gather()
        second.join(20)
        assert not second.is_alive()
        assert teams[0].store.add("counter", 1) == 1


def test_a_port_that_is_taken_is_one_sentence(store):
    with pytest.raises(ValueError, match=r"rank 0 cannot listen at .*; give another MASTER_PORT"):
        gather_processes()


def test_an_environment_that_is_not_torchrun_s_is_one_sentence(job, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="LOCAL_RANK is not set: start them with torchrun"):
        gather_processes()


def watched(monkeypatch: pytest.MonkeyPatch, *, joined: bool = False) -> tuple[Team, list[bool]]:
    """A rank after its watch has ended, and whether the main thread was interrupted."""
    own, interrupted = Team(0, 2, "job"), list[bool]()

    def interrupt() -> None:
        interrupted.append(True)
        own.over.set()

    monkeypatch.setattr(team._thread, "interrupt_main", interrupt)
    own.store, own.joined = own.client(), joined
    thread = threading.Thread(target=own.watch)
    thread.start()
    thread.join(10 if not joined else 1)
    own.over.set()
    thread.join(10)
    return own, interrupted


def test_a_rank_that_gives_no_sign_of_life_is_named_and_the_first_to_notice_says_so(
    store, monkeypatch
):
    monkeypatch.setattr(team, "_SILENCE_AT_START", 0.3)
    own, interrupted = watched(monkeypatch)
    assert interrupted
    assert not own.followed
    assert own.lost is not None
    assert own.lost.startswith("process 1 of this job has given no sign of life for 0 seconds; ")
    assert own.store.add("failed", 0) == 1


def test_a_rank_that_works_may_be_silent_for_longer_than_one_that_joins(store, monkeypatch):
    monkeypatch.setattr(team, "_SILENCE_AT_START", 0.1)
    own, interrupted = watched(monkeypatch, joined=True)
    assert (interrupted, own.lost, own.followed) == ([], None, False)


def test_a_rank_follows_the_first_that_failed_and_does_not_blame(store, monkeypatch):
    dist.PrefixStore("job", store).add("failed", 1)
    own, interrupted = watched(monkeypatch)
    assert interrupted
    assert own.followed
    assert not own.blames()


def test_the_first_to_fail_blames_and_so_does_one_whose_store_has_gone(store):
    first, second = Team(0, 2, "job"), Team(1, 2, "job")
    first.store, second.store = first.client(), second.client()
    assert [first.blames(), second.blames()] == [True, False]
    assert Team(1, 2, "job").blames()


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("auto", 0, "`device` auto is for one process"),
        ("mps", 0, "several processes compute on cpu or cuda, got mps"),
        ("cuda:1", 2, "say `device` cuda, got cuda:1"),
        ("cuda", 1, "has 1 GPUs, one a process: give torchrun --nproc-per-node 1"),
    ],
)
def test_a_device_that_several_processes_cannot_share_is_one_sentence(
    monkeypatch, device, gpus, message
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        own_device(device)


def test_each_rank_has_a_gpu_of_its_own_and_a_machine_without_leaves_the_choice_to_torch(
    monkeypatch,
):
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda") == ("cuda:1", "cpu:gloo,cuda:nccl")
    assert own_device("cpu") == ("cpu", "gloo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert own_device("cuda") == ("cuda", "gloo")
    assert chosen == [1]
