"""A stream gives every row once, over ranks, workers and resumes, and each step the Z of what it holds."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, interleave_datasets
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

from lightning_sft.data.batches import stream
from lightning_sft.data.batches.interleave import interleave, num_lanes
from lightning_sft.data.batches.interleave import lanes as stream_lanes
from lightning_sft.data.batches.stream import StreamLoader
from lightning_sft.data.batches.stream_blocks import RankSummary, StreamLayout, deal
from lightning_sft.data.rows.mixture import Mixture, Part, as_mixture
from lightning_sft.data.tokens.dataset import load_split
from lightning_sft.data.tokens.encode_rows import EncodingConfig
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.demos import tiny_tokenizer
from lightning_sft.types import Batch, InputError

TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 7)} for i in range(100)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_ROWS_AT_A_TIME", 4)


def shape(**settings: Any) -> StreamLayout:
    defaults = {"num_ranks": 1, "accumulate": 1, "capacity": 200, "packing": "packed", "buffer_rows": 16, "seed": 0}
    return StreamLayout(**{**defaults, **settings})


def loader(source: Any = None, rank: int = 0, **settings: Any) -> StreamLoader:
    own = {name: settings.pop(name) for name in list(settings) if name in StreamLayout.__dataclass_fields__}
    mixture = as_mixture(ROWS if source is None else source)
    return StreamLoader(mixture, EncodingConfig(TOKENIZER), shape(**own), rank, **settings)


def accounted(
    source: Any, recipe: EncodingConfig | None = None, **settings: Any
) -> tuple[list[Batch], RowReport, dict[str, int]]:
    """The batches of an epoch, and what is said at its end."""
    heard: list[Any] = []
    end = {"is_strict": False, "finished": lambda *said: heard.extend(said)}
    batches = list(StreamLoader(as_mixture(source), recipe or EncodingConfig(TOKENIZER), shape(), **end, **settings))
    return batches, *heard


def names(batches: Any) -> list[tuple[str, ...]]:
    return [tuple(name for name in batch.provenance if name != "padding") for batch in batches]


def over_ranks(num_ranks: int, make: Callable[[], Any] = lambda: ROWS, **settings: Any) -> list[list[Batch]]:
    """What each rank gets, where ranks are threads that meet at every block.

    One runs at a time, since a worker that is forked while another thread holds a lock may wait for it forever.
    """
    turn, barrier, said = threading.Lock(), threading.Barrier(num_ranks), [None] * num_ranks
    found: list[list[Batch]] = [[] for _ in range(num_ranks)]
    sources = [make() for _ in range(num_ranks)]  # an iterable data set keeps the state of its iteration

    def run(rank: int) -> None:
        def meet() -> None:
            turn.release()
            barrier.wait(60)
            turn.acquire()

        def gather(share: RankSummary) -> list[Any]:
            said[rank] = share
            meet()
            heard = list(said)
            meet()
            return heard

        with turn:
            found[rank] = list(loader(sources[rank], rank, num_ranks=num_ranks, gather=gather, **settings))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_every_row_comes_once_and_every_step_has_the_weight_of_what_it_holds(num_ranks: int, accumulate: int) -> None:
    ranks = over_ranks(num_ranks, accumulate=accumulate)
    assert sorted(name for rank in ranks for names_ in names(rank) for name in names_) == sorted(
        f"row {i}" for i in range(1, 101)
    )
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % accumulate == 0
    for begin in range(0, len(ranks[0]), accumulate):
        step = [batch for rank in ranks for batch in rank[begin : begin + accumulate]]
        weight = sum(batch.target_weights.sum().item() for batch in step)
        assert weight > 0
        assert all(batch.normalizer == pytest.approx(weight, rel=1e-12) for batch in step)


def test_workers_change_nothing() -> None:
    alone = names(loader())
    assert names(loader(num_workers=1)) == alone
    assert names(loader(num_workers=2)) == alone


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    assert names(loader()) == names(loader())
    assert names(loader(seed=1)) != names(loader())
    assert names(loader(place=lambda: (1, 0))) != names(loader())


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 13])
def test_a_run_goes_on_at_its_micro_batch_without_the_rows_before_its_block(
    done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = names(loader(accumulate=1))
    place = [0, 0]
    killed = loader(place=lambda: (place[0], place[1]))
    iterator = iter(killed)
    for _ in range(done + 1):  # Lightning looks one micro-batch ahead
        next(iterator)
    place[1] = done
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = loader(place=lambda: (0, done))
    resumed.load_state_dict(state)
    encoded: list[int] = []
    encode = stream.Chunks.run

    def counted(self: Any, *args: Any) -> Iterator[Any]:
        for chunk in encode(self, *args):
            encoded.append(chunk.account.num_rows)
            yield chunk

    monkeypatch.setattr(stream.Chunks, "run", counted)
    assert names(resumed) == everything[done:]
    assert sum(encoded) == 100 - 16 * max(block for block, begin in state["blocks"] if begin <= done)


def test_a_state_of_another_shape_is_refused_and_says_what_differs() -> None:
    with pytest.raises(InputError, match=r"read with num_ranks=1, now 2; buffer_rows=16, now 32"):
        loader(num_ranks=2, buffer_rows=32).load_state_dict(loader().state_dict())


def test_a_state_of_another_epoch_begins_the_epoch() -> None:
    iterator = iter(killed := loader())
    next(iterator)
    later = loader(place=lambda: (1, 0))
    later.load_state_dict(killed.state_dict())
    assert names(later) == names(loader(place=lambda: (1, 0)))


def test_a_limit_cuts_the_normalizer_of_the_step_that_it_cuts() -> None:
    for limit in (1, 2, 4, 5, 8):
        used = list(loader(accumulate=3, limit=limit))[:limit]
        for begin in range(0, limit, 3):
            window = used[begin : begin + 3]
            assert {batch.normalizer for batch in window} == {sum(b.target_weights.sum().item() for b in window)}


def test_the_first_rows_of_a_stream_are_the_same_in_each_epoch(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:16]))
    mixture = Mixture({"": Part(str(tmp_path), first=20)})
    for epoch in range(4):
        found = names(StreamLoader(mixture, EncodingConfig(TOKENIZER), shape(), place=lambda epoch=epoch: (epoch, 0)))
        lines = sorted(Path(place).name for own in found for place in own)
        assert lines == sorted([f"a.jsonl:{i}" for i in range(1, 17)] + [f"b.jsonl:{i}" for i in range(1, 5)])


def test_files_of_a_stream_come_in_another_order_each_epoch(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:16]))

    def first(epoch: int) -> str:
        return Path(names(loader(str(tmp_path), place=lambda: (epoch, 0)))[0][0].split(":")[0]).stem

    assert len({first(epoch) for epoch in range(8)}) > 2


def test_what_cannot_be_used_is_counted_over_ranks_and_said_at_the_end() -> None:
    bad = [*ROWS[:20], {"prompt": "x", "completion": 7}, {"prompt": "x", "completion": "y" * 300, "id": 1}]
    batches, account, _ = accounted(bad, EncodingConfig(TOKENIZER, max_length=100))
    assert sum(len(name) for name in names(batches)) == 20
    assert (account.num_rows, len(account.refused), len(account.too_long), account.ignored["id"]) == (22, 1, 1, 1)


def test_a_row_that_cannot_be_used_is_an_error_when_it_is_reached() -> None:
    batches = iter(loader([*ROWS[:20], {"prompt": "x", "completion": 7}]))
    assert names([next(batches)])
    with pytest.raises(InputError, match=r"row 21: 'completion' must be a string[\s\S]*data.invalid_rows=skip"):
        list(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_line_that_is_no_json_is_an_error_when_it_is_reached(jsonl: Callable[..., str], num_workers: int) -> None:
    path = jsonl("".join(json.dumps(row) + "\n" for row in ROWS[:40]) + "{\n" + json.dumps(ROWS[0]) + "\n")
    batches = iter(loader(path, num_workers=num_workers))
    next(batches)
    with pytest.raises(InputError, match=r"train.jsonl:41: not valid JSON"):
        list(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_or_is_counted_where_rows_may_be_left_out(jsonl: Callable[..., str], num_workers: int) -> None:
    path = jsonl("{\n" + "".join(json.dumps(row) + "\n" for row in ROWS[:40]) + "{\n" + json.dumps(ROWS[40]) + "\n")
    batches, account, _ = accounted(path, num_workers=num_workers)
    assert sum(map(len, names(batches))) == 41
    assert [reason.split(": ")[0] for reason in account.refused] == [f"{path}:1", f"{path}:42"]


def test_a_stream_of_the_hub_gives_every_row_once_with_its_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: sharded(4))
    found = [place for own in names(loader("hf:a/b:train")) for place in own]
    assert len(set(found)) == len(found) == len(list(sharded(4)))
    assert {place.split(", ")[0] for place in found} == {f"hf:a/b:train:shard {i}" for i in (1, 2, 3)}


def test_a_data_set_that_is_no_stream_is_read_once_by_all_workers_together() -> None:
    split = load_split("train", sharded(4), EncodingConfig(TOKENIZER), num_workers=2)
    assert len(split.examples) == len(list(sharded(4)))


def test_the_format_of_a_file_is_that_of_its_first_row_for_every_worker(jsonl: Callable[..., str]) -> None:
    rows = [*ROWS[:6], *({"instruction": "a", "output": "b"} for _ in range(6))]
    path = jsonl(rows)
    for num_workers in (0, 2):
        _, account, _ = accounted(path, num_workers=num_workers)
        assert [text.split(": ")[0].rpartition(":")[2] for text in account.refused] == [*"789", "10", "11", "12"]
        assert all(f"{path}:1 is of prompt-completion" in text for text in account.refused)


def generated(shards: list[int], rows: int = 9) -> Iterator[dict[str, str]]:
    """Shards of unlike sizes, the last of which is empty."""
    for shard in shards:
        for i in range(rows * (3 - shard % 4)):
            yield {"prompt": f"Say {shard}", "completion": f"{i} " * (1 + i % 7)}


def sharded(count: int) -> IterableDataset:
    return IterableDataset.from_generator(generated, gen_kwargs={"shards": list(range(count))})


ITERABLE = {
    "of 1 shard": lambda: sharded(1),
    "of 3 shards": lambda: sharded(3),
    "of 4 shards": lambda: sharded(4),
    "of 20 shards": lambda: sharded(20),
    "of a table": lambda: Dataset.from_list(ROWS).to_iterable_dataset(num_shards=8),
    "shuffled": lambda: sharded(8).shuffle(seed=1, buffer_size=10),
    "mapped": lambda: sharded(8).map(lambda row: {**row, "prompt": row["prompt"] + "!"}).filter(lambda row: True),
    "in batches": lambda: sharded(8).map(lambda rows: {key: cells[:-1] for key, cells in rows.items()}, batched=True),
    "the first rows": lambda: sharded(8).take(50),
    "of two": lambda: interleave_datasets([sharded(4), sharded(4)]),
}


class Sharding:
    """Rows that shard themselves by worker, as PyTorch's documentation recommends."""

    def __iter__(self) -> Iterator[dict[str, str]]:
        info = get_worker_info()
        yield from ROWS[info.id :: info.num_workers] if info else ROWS


def texts(ranks: list[list[Batch]]) -> Counter[bytes]:
    """The documents of all batches but padding, and how often each is there."""
    found: Counter[bytes] = Counter()
    for batch in (batch for rank in ranks for batch in rank):
        ids = batch.input_ids[0].tolist()
        for name, length in zip(batch.provenance, batch.spans, strict=True):
            own, ids = ids[:length], ids[length:]
            found[repr(own).encode()] += name != "padding"
    return +found


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "kind"),
    [
        *((ranks, workers, kind) for ranks, workers in [(1, 1), (1, 2), (2, 1)] for kind in ITERABLE),
        (4, 2, "of 20 shards"),
    ],
)
def test_every_row_of_an_iterable_data_set_comes_once(kind: str, num_ranks: int, num_workers: int) -> None:
    expected = texts([list(loader(list(ITERABLE[kind]())))])
    alone = over_ranks(num_ranks, ITERABLE[kind])
    assert texts(alone) == expected
    for rank, batches in enumerate(over_ranks(num_ranks, ITERABLE[kind], num_workers=num_workers)):
        assert names(batches) == names(alone[rank])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [3, 8])
def test_any_number_of_workers_gives_the_same_stream(num_workers: int) -> None:
    assert names(loader(sharded(20), num_workers=num_workers)) == names(loader(sharded(20)))


def test_rows_that_shard_themselves_by_worker_come_once() -> None:
    assert names(loader(Sharding(), num_workers=2)) == names(loader(ROWS))


@pytest.mark.parametrize(
    ("num_ranks", "num_workers", "num_read"), [(1, 1, 8), (1, 2, 4), (1, 8, 1), (2, 2, 2), (4, 2, 1)]
)
def test_a_worker_reads_its_own_shards_alone(num_ranks: int, num_workers: int, num_read: int) -> None:
    data = IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 4, 8, 12, 16, 20, 24, 28]})
    mixture, lanes = as_mixture(data), num_lanes(as_mixture(data), num_ranks)
    for rank in range(num_ranks):
        of_worker = [set[str]() for _ in range(num_workers)]
        for number in range(lanes):
            _, rows = next(stream_lanes(mixture, 4, 0, 0, lanes)[(rank + number * num_ranks) % lanes])
            of_worker[number % num_workers].add(rows[0][1].split(",")[0])
        assert {len(read) for read in of_worker} == {num_read}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [1, 6, 20])
def test_a_stream_of_shards_resumes_at_its_micro_batch(done: int, num_workers: int) -> None:
    everything = names(loader(sharded(20)))
    iterator = iter(killed := loader(sharded(20), num_workers=num_workers))
    for _ in range(done + 1):
        next(iterator)
    resumed = loader(sharded(20), place=lambda: (0, done), num_workers=2 - num_workers)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    assert names(resumed) == everything[done:]


def test_shards_come_in_another_order_each_epoch() -> None:
    first = {names(loader(sharded(4), place=lambda epoch=epoch: (epoch, 0)))[0] for epoch in range(6)}
    assert len(first) > 1


def test_a_state_of_a_stream_read_in_other_lanes_is_refused_and_an_old_state_has_one() -> None:
    state = loader(ROWS).state_dict()
    del state["shape"]["lanes"]  # of a release that did not shard
    loader(ROWS).load_state_dict(state)
    with pytest.raises(InputError, match="lanes=1, now 8"):
        loader(sharded(8)).load_state_dict(state)


def test_a_data_set_that_is_split_by_rank_already_is_refused() -> None:
    data = split_dataset_by_node(sharded(4), rank=0, world_size=2)
    with pytest.raises(InputError, match="Give all of it: each rank takes its own rows"):
        loader(data)


def test_the_shares_of_a_mixture_hold_and_parts_are_told_apart() -> None:
    mixture = Mixture({"a": Part(ROWS[:60], share=3), "b": Part(ROWS[60:70], share=1)})
    batches, _, targets = accounted(mixture)
    parts = Counter(batch.part_names[part] for batch in batches for part in batch.parts)
    assert set(Counter(name for own in names(batches) for name in own).values()) <= {1, 2, 3}
    assert parts["a"] >= 60
    found = Counter({name: sum(int((b.target_parts() == i).sum()) for b in batches) for i, name in enumerate("ab")})
    assert targets == found
    assert parts["b"] / (parts["a"] + parts["b"]) == pytest.approx(0.25, abs=0.05)


def test_without_shares_every_row_of_a_mixture_comes_once() -> None:
    batches = list(loader(Mixture({"a": Part(ROWS[:60]), "b": Part(ROWS[60:70], weight=0.5)})))
    assert sum(len(own) for own in names(batches)) == 70
    weights = {w for batch in batches for w in batch.target_weights.flatten().tolist()}
    assert weights == {0.0, 0.5, 1.0}


@given(
    weights=st.lists(st.lists(st.floats(0.1, 9), max_size=9), min_size=1, max_size=4).filter(any),
    accumulate=st.integers(1, 4),
)
def test_packs_are_dealt_out_once_in_steps_of_one_normalizer(weights: list[list[float]], accumulate: int) -> None:
    ranks = [deal(weights, accumulate, rank) for rank in range(len(weights))]
    assert len({len(dealt) for dealt in ranks}) == 1
    for own, dealt in zip(weights, ranks, strict=True):
        assert [pack for pack, _ in dealt if pack is not None] == list(range(len(own)))
    for begin in range(0, len(ranks[0]), accumulate):
        step = [(r, *m) for r, dealt in enumerate(ranks) for m in dealt[begin : begin + accumulate]]
        assert len({normalizer for _, _, normalizer in step}) == 1
        assert step[0][2] == pytest.approx(sum(weights[r][pack] for r, pack, _ in step if pack is not None))


def test_shares_of_streams_are_exact_to_the_row_whatever_the_chunks() -> None:
    def passes(rows: int, chunk: int) -> Any:
        return lambda number: iter([[0] * min(chunk, rows - begin) for begin in range(0, rows, chunk)])

    for sizes, shares, wanted in (
        ((200, 100), (2, 1), (200, 100)),
        ((500, 100), (2, 1), (500, 250)),
        ((90, 70, 10), (1, 1, 0.5), (90, 90, 45)),
    ):
        for chunk in (7, 64, 1000):
            counts = [0] * len(sizes)
            for number, rows in interleave([passes(size, chunk) for size in sizes], shares):
                counts[number] += len(rows)
            assert all(count >= size for count, size in zip(counts, sizes, strict=True))
            assert counts == [round(counts[0] / shares[0] * share) for share in shares]
            if chunk == 7:
                assert max(abs(a - b) for a, b in zip(counts, wanted, strict=True)) <= 2 * chunk
