"""Latency on a named device: nanoseconds of a batch, from a table that was timed there (section 2.13)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from nas.prices.latency_table import RECORD, LatencyTable, network_facts, read_table
from nas.prices.options import PriceOptions
from nas.prices.price import Outside, Price
from search_spaces.errors import UserError
from search_spaces.slices import BlockShape, BlockSlice, count
from search_spaces.space import SearchSpace
from supernets.chains import kinds_of_block, widths_of
from supernets.flops import BlockCosts, NetworkCosts
from supernets.supernet import Supernet


class Latency(Price):
    """A sum over halves, each read from the table at its own widths and its stage's; a skipped half takes none."""

    name, words, scale, unit, column = "latency", "latency", 1e6, "ms", "ms"
    flag: ClassVar[str | None] = "ms"

    def __init__(self, table: LatencyTable | None = None) -> None:
        self._table = table

    @property
    def table(self) -> LatencyTable:
        """What it reads."""
        assert self._table is not None, "a price by latency is opened with its table"
        return self._table

    def opened(self, options: PriceOptions) -> "Latency":
        if options.latency_table is None:
            raise UserError(
                "latency is priced by a table of the device; make one there by python -m nas.latency and give it with"
                " --latency-table FILE"
            )
        return Latency(read_table(Path(options.latency_table)))

    def check(self, space: SearchSpace, original: Supernet) -> None:
        """Refuse another network's table, and what is in none: blocks narrower than their stage, chosen units."""
        table = self.table
        facts, found = network_facts("", {}, original), table.network
        for name, words in (("class", "a"), ("input_size", "input"), ("stage_widths", "stages of")):
            if found.get(name) != facts[name]:
                raise UserError(
                    f"--latency-table {table.path} is of {found.get('model')}, {words} {_spelt(found.get(name))}; this"
                    f" network is {words} {_spelt(facts[name])}; make a table of it"
                )
        whole = zip(original.shapes, original.adapter.costs.blocks, strict=True)
        for shape, costs in dict.fromkeys(whole):
            for kind in kinds_of_block(costs):
                table.half(kind, widths_of(kind, shape))
        method = space.method
        if method.kept_names:
            raise UserError(f"{space.name} chooses which units it keeps, a latency table knows how many; {INSTEAD}")
        if not method.halves and space.settings.width == "stream" and not method.uniform:
            raise UserError(
                f"{space.name}: blocks narrower than their stage are in no table of latencies; take --width inner,"
                f" or {INSTEAD}"
            )

    def recorded(self, cost: int, full: int) -> dict[str, Any]:
        setting, found = self.table.setting, {"predicted_ms": cost / self.scale, "backbone_ms": full / self.scale}
        return {RECORD: {"on": setting.words(), "table": str(self.table.path), **found, "setting": asdict(setting)}}

    def remark(self) -> str:
        return self.table.noise()

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        if kept.mlp_stream is not None or isinstance(kept.v_channels, tuple):
            raise UserError(f"heads or channels of their own widths are in no table of latencies; {INSTEAD}")
        attention, mlp = kinds_of_block(costs)
        widths = {
            "stream": kept.stream,
            "heads": count(kept.heads),
            "qk": shape.head_dim if kept.qk is None else kept.qk,
            "v": shape.v_dim if kept.v_channels is None else kept.v_channels,
            "hidden": count(kept.hidden),
        }
        there = [kind for kind, has in ((attention, kept.attn), (mlp, kept.mlp)) if has]
        return sum(self.table.half(kind, {name: widths[name] for name in kind.names}) for kind in there)

    def outer(self, costs: NetworkCosts) -> Outside:
        rotated = self.table.rotated
        return rotated if rotated is not None and 0 in costs.streams else self.table.outside


INSTEAD = "search free widths, or leave latency out"


def _spelt(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
