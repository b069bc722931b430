"""``Schedule``: when and where each part runs, and on how many SMs."""

from dataclasses import dataclass

from nanoflow_compiler.ir.nano import NanoGraph

__all__ = ["Schedule", "Slot"]

_CHART_COLUMNS = 96


@dataclass(frozen=True, slots=True)
class Slot:
    """One part on one lane, with its SM budget."""

    op: str
    lane: int
    sms: int
    start_us: float
    end_us: float

    def __str__(self) -> str:
        return (
            f"[{self.start_us:10.1f} .. {self.end_us:10.1f}] lane {self.lane} {self.sms:4d} SMs"
            f"  {self.op}"
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Slots in the order in which the host issues them."""

    nano: NanoGraph
    slots: tuple[Slot, ...]
    num_lanes: int
    num_sms: int
    device: str
    power_floor_us: float = 0.0
    """Time that the joules of all slots need at the power cap; 0 where no cap is known."""

    @property
    def makespan_us(self) -> float:
        """Predicted end of the last slot, never below what the power cap allows."""
        end = max((slot.end_us for slot in self.slots), default=0.0)
        return max(end, self.power_floor_us)

    def __str__(self) -> str:
        head = (
            f"schedule for {self.device}: {len(self.slots)} slots on {self.num_lanes} lanes,"
            f" {self.makespan_us:.1f} us"
        )
        power = [f"  power floor {self.power_floor_us:.1f} us"] if self.power_floor_us else []
        return "\n".join([head, *power, *(f"  {slot}" for slot in self.slots)])

    def layer_chart(self) -> str:
        """The chart of the layer in the middle; of everything where there are no layers."""
        layers = [op.op.layer for op in self.nano.ops]
        middle = self.nano.graph.num_layers // 2
        names = {
            op.name for op, layer in zip(self.nano.ops, layers, strict=True) if layer == middle
        }
        slots = [slot for slot in self.slots if slot.op in names]
        if not slots:
            return self.chart()
        start, end = min(slot.start_us for slot in slots), max(slot.end_us for slot in slots)
        return f"layer {middle}, {end - start:.1f} us\n{self.chart(start_us=start, end_us=end)}"

    def chart(self, *, start_us: float = 0.0, end_us: float | None = None) -> str:
        """Lanes as rows of text, time to the right: one letter run per slot, then a legend."""
        last = self.makespan_us if end_us is None else end_us
        scale = _CHART_COLUMNS / max(last - start_us, 1e-9)
        rows = [[" "] * _CHART_COLUMNS for _ in range(self.num_lanes)]
        legend: list[str] = []
        shown = [slot for slot in self.slots if slot.end_us > start_us and slot.start_us < last]
        for index, slot in enumerate(shown):
            letter = chr(ord("A") + index % 26) if index < 26 else chr(ord("a") + index % 26)
            begin = max(0, int((slot.start_us - start_us) * scale))
            until = min(_CHART_COLUMNS, max(begin + 1, int((slot.end_us - start_us) * scale)))
            rows[slot.lane][begin:until] = letter * (until - begin)
            legend.append(f"{letter} {slot.op} ({slot.sms} SMs)")
        lines = [f"lane {lane} |{''.join(row)}|" for lane, row in enumerate(rows)]
        return "\n".join([*lines, "; ".join(legend)])
