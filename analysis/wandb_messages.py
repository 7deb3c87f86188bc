"""The messages of a .wandb file that a comparison needs, and of them the fields that it reads.

Names and numbers are those of wandb/proto/wandb_internal.proto, which must never change for wandb to read its
own files. Declared here, they need neither wandb, which takes half a second to import, nor the time to parse
what nobody asks for: protobuf passes over fields that it does not know.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

# Field: its type, with * where it repeats, and its number. After a | the fields of which one is there.
_MESSAGES = {
    "Record": "| history: HistoryRecord 2, config: ConfigRecord 5, run: RunRecord 17, exit: RunExitRecord 18",
    "HistoryRecord": "item: HistoryItem* 1",
    "HistoryItem": "key: string 1, nested_key: string* 2, value_json: string 16 | none: int32 3, "
    "boolean: bool 4, integer: sint64 5, number: double 6, text: string 7, json: string 8",
    "ConfigRecord": "update: ConfigItem* 1, remove: ConfigItem* 2",
    "ConfigItem": "key: string 1, nested_key: string* 2, value_json: string 16",
    "RunRecord": "run_id: string 1, config: ConfigRecord 4, run_group: string 6, job_type: string 7, "
    "display_name: string 8, tags: string* 10, start_time: Timestamp 17",
    "RunExitRecord": "exit_code: int32 1",
    "Timestamp": "seconds: int64 1, nanos: int32 2",
}
_PACKAGE = "crescendo.wandb"


def _declare() -> Any:
    """The class of Record. A field that is one of several is in the group `value`."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for group, listed in enumerate(fields.split("|")):
            if group:
                message.oneof_decl.add(name="value")
            for words in filter(str.strip, listed.split(",")):
                field, kind, number = words.replace(":", "").split()
                repeats, kind = kind.endswith("*"), kind.rstrip("*")
                made = message.field.add(
                    name=field,
                    number=int(number),
                    label=kinds.LABEL_REPEATED if repeats else kinds.LABEL_OPTIONAL,
                )
                if kind in _MESSAGES:
                    made.type, made.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
                else:
                    made.type = getattr(kinds, f"TYPE_{kind.upper()}")
                if group:
                    made.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Record"))


Record = _declare()
