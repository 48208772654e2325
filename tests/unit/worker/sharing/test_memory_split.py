"""Memory of a device for several models: the weights of all first, then equal parts of what they leave free."""

from __future__ import annotations

from worker.sharing.memory_split import MemorySplit
from worker.sharing.messages import FreeMemory, MayLoad, MeasureMemory, MemoryBudget, NeedMemory, WeightsLoaded

GB = 10**9


def started() -> MemorySplit:
    """Return the split of two models that have both their budget."""
    split = MemorySplit(("one", "two"))
    assert split.take(0, NeedMemory(2 * GB, 10 * GB)) == [], "it waits for what the other needs"
    assert split.take(1, NeedMemory(4 * GB, 9 * GB)) == [(0, MayLoad()), (1, MayLoad())]
    assert split.take(1, WeightsLoaded()) == []
    assert split.take(0, WeightsLoaded()) == [(0, MeasureMemory()), (1, MeasureMemory())]
    assert split.take(0, FreeMemory(4 * GB)) == []
    assert split.take(1, FreeMemory(3 * GB)) == [(0, MemoryBudget(3 * GB // 2)), (1, MemoryBudget(3 * GB // 2))]
    return split


def test_models_load_when_all_fit_and_divide_what_the_weights_leave_free() -> None:
    assert started().budget_bytes == 3 * GB // 2


def test_models_that_do_not_fit_together_are_refused_with_the_numbers() -> None:
    split = MemorySplit(("one", "two"))
    split.take(0, NeedMemory(2 * GB, 5 * GB))
    (first, told), (second, same) = split.take(1, NeedMemory(4 * GB, 5 * GB))
    assert (first, second) == (0, 1)
    assert told == same
    assert isinstance(told, MayLoad)
    for part in ("one needs 2.00 GB", "two needs 4.00 GB", "5.00 GB are free", "BASIC_TARGET"):
        assert part in told.refusal


def test_a_process_that_starts_again_gets_its_budget_back_without_waiting() -> None:
    split = started()
    split.forget(1)
    assert split.take(1, NeedMemory(4 * GB, 0)) == [(1, MayLoad())], "the memory of its last process is not free yet"
    assert split.take(1, WeightsLoaded()) == [(1, MemoryBudget(3 * GB // 2))]


def test_a_process_that_dies_while_it_loads_is_waited_for_and_all_measure_again() -> None:
    split = MemorySplit(("one", "two"))
    split.take(0, NeedMemory(2 * GB, 10 * GB))
    split.take(1, NeedMemory(4 * GB, 10 * GB))
    split.take(1, WeightsLoaded())
    split.take(0, WeightsLoaded())
    assert split.take(1, FreeMemory(3 * GB)) == []
    split.forget(0)
    assert split.take(0, NeedMemory(2 * GB, 10 * GB)) == [(0, MayLoad())]
    assert split.take(0, WeightsLoaded()) == [(0, MeasureMemory()), (1, MeasureMemory())]
    assert split.take(0, FreeMemory(4 * GB)) == []
    assert len(split.take(1, FreeMemory(4 * GB))) == 2
    assert split.budget_bytes == 2 * GB
