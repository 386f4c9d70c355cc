"""The TensorBoard sink: event files in the run folder."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.tracking.model_summary import Distribution, Layer
from trainer.tracking.row_file import RowFile
from trainer.tracking.sink import Sink


class TensorBoard(Sink):
    """TensorBoard events, one record a row.

    Written here rather than by `SummaryWriter`, whose thread prints a traceback of its own when the disk fails, and
    which makes a record of every scalar.
    """

    def __init__(self, folder: Path, resume_step: int, tell: Callable[[str], None]) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"

        def open_events() -> int:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

        self._records = RecordWriter(RowFile("tensorboard", open_events, tell))
        self._record(file_version="brain.Event:2")
        # A session's start makes readers drop what earlier files hold from this step on (`purge_step`).
        start = SessionLog(status=SessionLog.START)
        self._record(step=resume_step + 1, session_log=start)

    def write(self, scalars: Mapping[str, float], step: int, epoch: float) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        values.append(Summary.Value(tag="epoch", simple_value=epoch))
        self._record(step=step, summary=Summary(value=values))

    def weights(self, found: Mapping[str, Distribution], step: int, epoch: float) -> None:
        values = [Summary.Value(tag=f"weight_norm/{name}", simple_value=own.norm) for name, own in found.items()]
        for name, own in found.items():
            histogram = HistogramProto(
                min=own.edges[0],
                max=own.edges[-1],
                num=sum(own.counts),
                sum=own.sum,
                sum_squares=own.sum_squares,
                bucket_limit=own.edges[1:],
                bucket=own.counts,
            )
            values.append(Summary.Value(tag=f"weights/{name}", histo=histogram))
        self._record(step=step, summary=Summary(value=values))

    def graph(self, layers: list[Layer]) -> None:
        nodes = []
        for layer in layers:
            shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in layer.shape])
            attributes = {"_output_shapes": AttrValue(list=AttrValue.ListValue(shape=[shape]))}
            for name, sizes in layer.parameters.items():
                attributes[name] = AttrValue(s=" x ".join(map(str, sizes)).encode())
            inputs = [_scoped(source) for source in layer.inputs]
            nodes.append(NodeDef(name=_scoped(layer.name), op=layer.kind, input=inputs, attr=attributes))
        self._record(graph_def=GraphDef(node=nodes).SerializeToString())

    def close(self, failed: bool) -> None:
        self._records.close()

    def _record(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def _scoped(layer: str) -> str:
    """The layer's name as TensorBoard unfolds it, module by module."""
    return layer.replace(".", "/")
