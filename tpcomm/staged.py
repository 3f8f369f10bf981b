"""NCCL, with small messages taken by kernels over staging memory where every peer has access."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tpcomm import size_table
from tpcomm.communicator import AddRmsNorm, ReduceOp, check_layout, check_reducible, gather_output
from tpcomm.cuda_driver import load_cuda_driver
from tpcomm.errors import CommError, CommTimeout
from tpcomm.graph_timer import measure_in_graph, wait_idle
from tpcomm.nccl import NcclCommunicator
from tpcomm.nccl_api import Nccl
from tpcomm.norm_kernel import add_rms_norm_reference
from tpcomm.paths import CommPath
from tpcomm.records import BARRIER
from tpcomm.size_table import SizeTable, unmeasured_table
from tpcomm.staged_ways import STAGED_WAYS, staged_ways
from tpcomm.staging import Staging, host_identity


class StagedCommunicator(NcclCommunicator):
    """Messages of at most `staging_bytes` go through staging memory where `table` says so.

    Every rank takes the same way: whether staging is there is agreed by NCCL when the group
    forms, and nothing but `preflight`, which agrees too, changes it or the table later.
    `staging_absent` says why it is not used.
    """

    def __init__(
        self,
        nccl: Nccl,
        unique_id: bytes,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
        staging_bytes: int,
        name: str,
    ) -> None:
        self._staging: Staging | None = None
        super().__init__(nccl, unique_id, rank, world_size, device, timeout_s)
        self._staging_bytes = staging_bytes
        self.staging_absent = ""
        self.table = SizeTable(())
        self._switched_off: dict[tuple[str, str], str] = {}
        self._form_staging(name)

    @property
    def staging(self) -> Staging | None:
        """The staging memory, for who calls its kernels by themselves; None where it is off."""
        return self._staging

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        staging = self._staging
        path = self.table.path(size_table.ALL_REDUCE, tensor.nbytes, size_table.NCCL)
        if staging is None or path == size_table.NCCL:
            return super().all_reduce(tensor, op)
        check_layout(tensor, self.device)
        check_reducible(tensor)
        if path == size_table.TWO_SHOT and staging.takes_two_shot(tensor):
            call = staging.two_shot
        elif staging.takes_one_shot(tensor):
            call = staging.one_shot
        else:  # empty, or integers, which take twice their size in staging memory
            return super().all_reduce(tensor, op)
        self._usable()
        self.stats.all_reduce.add(tensor.nbytes)
        return call(tensor, op)

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        staging = self._staging
        path = self.table.path(size_table.ALL_GATHER, tensor.nbytes, size_table.NCCL)
        if staging is None or path == size_table.NCCL or not staging.takes_all_gather(tensor):
            return super().all_gather(tensor, out)
        check_layout(tensor, self.device)
        self._usable()
        out = gather_output(tensor, out, self.world_size)
        self.stats.all_gather.add(tensor.nbytes)
        return staging.all_gather(tensor, out)

    def all_reduce_add_rms_norm(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        add_rms_norm: AddRmsNorm = add_rms_norm_reference,
    ) -> Tensor:
        staging = self._staging
        path = self.table.path(size_table.ADD_RMS_NORM, tensor.nbytes, size_table.SEPARATE)
        if (
            staging is None
            or path != size_table.FUSED
            or not staging.takes_add_rms_norm(tensor, residual, weight)
        ):
            return super().all_reduce_add_rms_norm(tensor, residual, weight, eps, add_rms_norm)
        check_layout(tensor, self.device)
        self._usable()
        self.stats.all_reduce.add(tensor.nbytes)
        return staging.all_reduce_add_rms_norm(tensor, residual, weight, eps)

    def abort(self) -> None:
        """Free NCCL's kernels as NcclCommunicator does, and our own by their abort word."""
        staging = self._staging
        super().abort()
        if staging is not None:
            staging.abort()

    def rejoin(self, unique_id: bytes, name: str) -> None:
        """After `abort`: form the group again; any of the other ranks may be new processes.

        Collective with their creation: `unique_id` and `name` are the new group's. NCCL is built
        anew, so graphs that hold its calls are void; graphs that hold staged calls alone go on.
        Every rank runs `preflight` afterwards, or none. Call it when the stream has drained.

        Raises:
            CommError: the group was not aborted.
            CommTimeout: not all ranks came, or what was aborted still runs.
        """
        if not self._aborted.is_set():
            raise CommError("rejoin is for a group that was aborted")
        wait_idle(self.timeout_s, "what was aborted")
        self._aborted.clear()
        self._failed = False
        self._handle = self._join_group(unique_id)
        self._token.fill_(1)
        self._state.zero_()
        self._ring.zero_()
        self._warm_up()
        self._switched_off.clear()
        self.table = SizeTable(())
        self._form_staging(name)

    def close(self) -> None:
        """As NcclCommunicator; the staging memory is unmapped once all ranks are past a barrier.

        After a failure it stays mapped until the process ends, since a peer may still use it.
        """
        super().close()
        if self._staging is not None and not self._aborted.is_set() and not self._failed:
            self._staging.close()
            self._staging = None

    def paths(self) -> list[CommPath]:
        """Both ways of each operation, and last NCCL's all-reduce, which is always there."""
        staging = self._staging
        ways = [] if staging is None else staged_ways(staging)
        absent = [
            CommPath(name, self.device, None, operation, absent=self.staging_absent)
            for operation, name in STAGED_WAYS
            if staging is None
        ]
        staged = [self._guarded(way) for way in ways]
        (nccl,) = super().paths()
        gather = replace(nccl, operation=size_table.ALL_GATHER, call=super().all_gather)
        separate = replace(
            nccl,
            name=size_table.SEPARATE,
            operation=size_table.ADD_RMS_NORM,
            call=super().all_reduce_add_rms_norm,
        )
        others = [gather, *([separate] if staging is not None else [])]
        return [*absent, *staged, *others, nccl]

    def _record_tables(self) -> tuple[Tensor, Tensor]:
        """One count for both ways, so that records are ordered."""
        if self._staging is None:
            return super()._record_tables()
        return self._staging.tables.state, self._staging.tables.ring

    def _guarded(self, way: CommPath) -> CommPath:
        reason = self._switched_off.get((way.operation, way.name), "")
        return replace(
            way,
            absent=reason,
            wait=lambda timeout_s: self._wait_idle(timeout_s, f"{way.operation} by {way.name}"),
            rescue=self._rescue_staging,
            switch_off=lambda why, hung: self._switch_off(way, why, hung),
            measure=measure_in_graph,
        )

    def _form_staging(self, name: str) -> None:
        """Make, exchange and map the buffers, agreeing after each step that no rank failed.

        A buffer that is there already is kept, at its address.
        """
        staging, self._staging = self._staging, None
        reason = self._cannot_share(self._staging_bytes)
        if not reason and staging is None:
            try:
                staging = Staging(
                    self.rank, self.world_size, self.device, self._staging_bytes, load_cuda_driver()
                )
            except CommError as error:
                reason = str(error)
        reason = self._agree(reason)
        if not reason and staging is not None:
            try:
                staging.connect(name, self.timeout_s)
            except CommError as error:
                reason = str(error)
            reason = self._agree(reason)
        if reason and staging is not None:
            staging.close()
            staging = None
        self._staging, self.staging_absent = staging, reason
        if staging is not None:
            self.table = unmeasured_table(self.world_size, staging.limit_bytes)
            with self._stamped(BARRIER, 0):  # loads the stamps for these tables before any capture
                pass

    def _cannot_share(self, staging_bytes: int) -> str:
        """Why the ranks cannot share memory, as all of them see alike; empty if they may."""
        own = torch.tensor([host_identity(), staging_bytes], dtype=torch.int64, device=self.device)
        everyone = torch.empty((self.world_size, 2), dtype=torch.int64, device=self.device)
        self._enqueue_all_gather(own, everyone)
        self.wait_stream(self.timeout_s, "the exchange of host names")
        hosts, sizes = everyone.t().tolist()
        if len(set(sizes)) > 1:
            return f"staging_bytes differ between ranks: {sizes}"
        if len(set(hosts)) > 1:
            return "the ranks are on different hosts"
        return "" if staging_bytes > 0 else f"staging_bytes is {staging_bytes}"

    def _agree(self, reason: str) -> str:
        """This rank's reason, or that another rank has one; empty if nobody has. Collective."""
        failed = torch.tensor([int(bool(reason))], dtype=torch.int32, device=self.device)
        self._enqueue_all_reduce(failed, ReduceOp.MAX)
        self.wait_stream(2 * self.timeout_s, "the agreement on staging")
        return reason or ("another rank could not use it" if failed.item() else "")

    def _rescue_staging(self, timeout_s: float) -> None:
        """Let the kernels that hang fall through; the stream is idle afterwards."""
        if self._staging is not None:
            self._staging.abort()
        if not self._stream_is_idle(timeout_s):
            raise CommTimeout("a staged all-reduce did not end by its abort word")

    def _switch_off(self, way: CommPath, reason: str, hung: bool) -> None:
        """One way; all that use staging memory if calls hung, since nobody knows its state then.

        The memory stays mapped: a peer's kernel that was late may still write to it.
        """
        self._switched_off[way.operation, way.name] = reason
        self.table = self.table.without(way.operation, way.name)
        if hung:
            self._staging, self.staging_absent = None, reason
            self.table = SizeTable(())
