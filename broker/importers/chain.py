"""Who is asked about clients, in which order, and which listeners of EMQX ask somebody else."""

from __future__ import annotations

from broker.importers.findings import Findings, Table


class Chain:
    """Filled while backends and listeners are imported; `finish` writes it down."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.names: list[str] = []
        self.rights: list[str] = []
        """Those of them that tell what clients may do, in the order in which they are asked that."""
        self.common: list[str] = []
        """Those of them whose rules hold for all listeners, whoever lets clients in there."""
        self.own: list[Table] = []
        """Listeners that ask others than the rest."""
        self.gates: list[tuple[Table, str]] = []
        """Listeners with rules about addresses, and the table that holds these."""

    def add(self, table: Table, *, rights: bool = False, common: bool = False) -> None:
        """Ask this table too; `rights`: it tells what clients may do, `common`: whoever let them in."""
        if table.name not in self.names:
            self.names.append(table.name)
        if rights:
            self.rights.append(table.name)
            self.found.rights.add(table.name)
        if common:
            self.common.append(table.name)

    def _order(self) -> list[str]:
        """All names in the order of those that let clients in. Rules that hold for all let nobody in: they stand before
        the first whose rights were asked after theirs."""
        order = [name for name in self.names if name not in self.common]
        for name in reversed(self.common):
            at = self.rights.index(name)
            later = [order.index(one) for one in self.rights[at + 1 :] if one in order]
            order.insert(min(later, default=len(order)), name)
            early = [one for one in self.rights[:at] if one in order and order.index(one) > order.index(name)]
            if early:
                table = next(table for table in self.found.room("auth") if table.name == name)
                text = f"its rules were asked after those of {', '.join(early)}; here they are asked before"
                self.found.lose(table.origins.get("rules", table.origin), text)
        return order

    def finish(self) -> None:
        """Write down the order, and what each listener that differs asks."""
        on = {table.name for table in self.found.room("auth") if table.values.get("enabled") is not False}
        names = [name for name in self._order() if name in on]
        access = self.found.table("access")
        if names or self.gates or self.own:
            access.set("order", names, remark="as they were asked")
        for listener in self.own:
            listener.set("auth", [*listener.values["auth"], *(name for name in self.common if name in on)])
        for listener, gate in self.gates:
            listener.set("auth", [gate, *listener.values.get("auth", names)])
        if "order" in access.values and not names and access.values.get("allow_anonymous"):
            for listener in self.found.room("listeners"):  # an empty order refuses everybody
                if listener not in self.own:
                    listener.values.setdefault("allow_anonymous", True)
