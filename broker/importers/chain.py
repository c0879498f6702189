"""Who is asked about clients, in which order, and which listeners of EMQX ask somebody else."""

from __future__ import annotations

from broker.importers.findings import Findings, Table


class Chain:
    """Filled while backends and listeners are imported; `finish` writes it down."""

    def __init__(self, found: Findings) -> None:
        self.found = found
        self.names: list[str] = []
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
            self.found.rights.add(table.name)
        if common:
            self.common.append(table.name)

    def finish(self) -> None:
        """Write down the order, and what each listener that differs asks."""
        on = {table.name for table in self.found.room("auth") if table.values.get("enabled") is not False}
        names = [name for name in self.names if name in on]
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
