"""The code that jinja2 makes of a chat template, with what templates do most written out instead of called.

A template asks for keys of messages again and again, and each costs a call of the sandbox. Where an object is a plain
dictionary, a text or a loop, its checks find nothing, so the code has the look-up itself; whatever else it is, the
sandbox is asked as ever. What a template renders is the same.
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import LoopContext

OF_DICT = frozenset(dir(dict))
"""Names that a dictionary has itself, of which a template may mean the method."""

HARMLESS = {
    str: frozenset({"split", "strip", "lstrip", "rstrip", "startswith", "endswith", "replace", "lower", "upper"}),
    LoopContext: frozenset({"index", "index0", "first", "last", "previtem", "nextitem", "length", "revindex"}),
}
"""What the sandbox lets everybody have of a text and of ``loop``."""

_TESTS = {"string": "isinstance({}, str)", "none": "({} is None)"}


class QuickCode(CodeGenerator):
    """Generates code that looks keys and methods up by itself.

    >>> from lightning_sft.data.tokens.sandbox import template_environment
    >>> code = template_environment().compile("{{ message.role.upper() }}", raw=True)
    >>> "['role'] if" in code and "environment.getattr(" in code
    True
    """

    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:  # noqa: N802  # of jinja2
        """``message.role``, ``loop.last``."""
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in HARMLESS[LoopContext]:
            self._look_up(node.node, frame, "LoopContext", f".{node.attr}", f"getattr({{}}, {node.attr!r})")
        elif node.attr in OF_DICT:
            super().visit_Getattr(node, frame)
        else:
            self._look_up_key(node.node, node.attr, frame, "getattr")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802  # of jinja2
        """``message["role"]``."""
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(key, str) and key not in OF_DICT:
            self._look_up_key(node.node, key, frame, "getitem")
        else:
            super().visit_Getitem(node, frame)

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:  # noqa: N802  # of jinja2
        """``content is string``."""
        before, slot, after = _TESTS.get(node.name, "").partition("{}")
        if not slot or node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
            super().visit_Test(node, frame)
            return
        self.write(before)
        self.visit(node.node, frame)
        self.write(after)

    def visit_Call(  # noqa: N802  # of jinja2
        self, node: nodes.Call, frame: Frame, forward_caller: bool = False
    ) -> None:
        """``content.strip()``."""
        method, others = node.node, node.kwargs or node.dyn_args or node.dyn_kwargs or forward_caller
        is_plain = not others and all(isinstance(argument, (nodes.Const, nodes.Name)) for argument in node.args)
        if not (isinstance(method, nodes.Getattr) and method.attr in HARMLESS[str] and is_plain):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        taken = self.temporary_identifier()
        self.write(f"({taken}.{method.attr}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(f") if type({taken} := ")
        self.visit(method.node, frame)
        self.write(f") is str else environment.call(context, environment.getattr({taken}, {method.attr!r})")
        scopes = {"_loop_vars": frame.loop_frame, "_block_vars": frame.block_frame}  # as jinja2 passes them
        self.signature(node, frame, {name: name for name, is_there in scopes.items() if is_there})
        self.write("))")

    def _look_up_key(self, node: nodes.Expr, key: str, frame: Frame, slow: str) -> None:
        name = repr(key).replace("{", "{{").replace("}", "}}")
        self._look_up(node, frame, f"dict and {name} in {{}}", f"[{key!r}]", f"{slow}({{}}, {name})")

    def _look_up(self, node: nodes.Expr, frame: Frame, kind: str, quick: str, slow: str) -> None:
        """Where an object is of a kind, ``quick`` behind its name; else the look-up ``slow`` of the environment."""
        taken = self.temporary_identifier()
        self.write(f"({taken}{quick} if type({taken} := ")
        self.visit(node, frame)
        self.write(f") is {kind.format(taken)} else environment.{slow.format(taken)})")
