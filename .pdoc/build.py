"""Make the reference: python .pdoc/build.py FOLDER, then open FOLDER/index.html. Needs pdoc. A warning is an error."""

import ast
import importlib.util
import inspect
import operator
import re
import sys
import types
import typing
import warnings
from pathlib import Path
from unittest import mock

import jinja2
import pdoc

import gpuadam

HERE = Path(__file__).parent
PACKAGES = (
    "typing",
    "testing",
    "checkpoint",
    "foreign_state",
    "sharded",
    "offload",
    "planning",
    "torch",
    "reference",
    "kernels",
)
INNER = ("planning.model", "sharded.transports")  # every other file of these packages is internal
# What users call of an optimizer. Its other methods are for other files of gpuadam.
OF_OPTIMIZERS = ("__init__", "step", "state_dict", "load_state_dict", "save", "gathered", "describe", "flush", "close")
OF_OPTIMIZERS += ("options", "steps", "grads", "shards", "add_param_group")
NAMES = r"\w+(?:,\s+\w+)*"  # of arguments


def main(folder):
    """Write the pages into a folder."""
    if not importlib.util.find_spec("torch"):
        sys.modules["torch"] = torch_to_read()
    for name in gpuadam.__all__:  # some are loaded on first use, and pdoc looks into the module's dict
        getattr(gpuadam, name)
    names = ["gpuadam", "gpuadam.guide"] + [f"gpuadam.{name}" for name in PACKAGES]
    names += [rf"!gpuadam\.({'|'.join(PACKAGES)})\."]
    for name in INNER:
        names += [f"gpuadam.{name}", rf"!gpuadam\.{name}\."]
    types_as_written()
    pdoc.render.env.globals["text_of"] = text_of
    pdoc.render.env.globals["for_users"] = for_users
    pdoc.render.configure(template_directory=HERE)
    pdoc.pdoc(*names, output_directory=Path(folder))
    for page in Path(folder).rglob("*.html"):
        if found := re.search(r"(object|sentinel|function \w+) at 0x\w+|&lt;object object", page.read_text()):
            sys.exit(f"{page} shows the address of an object: {found[0]}. Give it a __repr__ that a reader understands")


def torch_to_read():
    """Return a module in torch's place, with which `gpuadam.torch` can be imported and described, and no more."""
    torch = types.ModuleType("torch")
    torch.__getattr__ = lambda name: mock.MagicMock(name=f"torch.{name}")
    torch.optim = types.SimpleNamespace(Optimizer=type("Optimizer", (), {"__module__": "torch.optim"}))
    torch.no_grad = lambda: lambda function: function
    return torch


def types_as_written():
    """Let signatures have their types as the source has them, `Array | None`, with links, and not what the names stand for."""
    path = HERE.parent / "gpuadam/typing.py"
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.AnnAssign)]
    aliases = {node.target.id: ast.unparse(node.value) for node in assigned}
    linked = rf"\b({'|'.join([*aliases, 'Group', 'RuleChanges', 'BitsFormat'])})\b(?!')"

    class Written(str):
        def __repr__(self):
            return re.sub(linked, r"gpuadam.typing.\1", self)

    def as_written(of_type, *_):
        if isinstance(of_type, typing.ForwardRef):
            of_type = of_type.__forward_arg__
        return Written(of_type) if isinstance(of_type, str) else of_type

    @jinja2.pass_context
    def linkify(context, code, namespace="", shorten=True):
        html = pdoc.render_helpers.linkify(context, code, namespace, shorten)
        return type(html)(re.sub(r">gpuadam\.typing\.(\w+)<", r">\1<", str(html))) if shorten else html

    pdoc.doc.safe_eval_type = pdoc.doc_types.safe_eval_type = as_written
    pdoc.render.env.filters["linkify"] = linkify
    value_of = pdoc.doc.Variable.default_value_str
    in_source = property(
        lambda doc: aliases.get(doc.name, "") if doc.modulename == "gpuadam.typing" else value_of.__get__(doc)
    )
    pdoc.doc.Variable.default_value_str = in_source


def for_users(doc):
    """Return whether a page shows a name: of an optimizer what users call, of a module no constants but those in `__all__`.

    A member of a class of which nothing is said is not shown: the signature and the text of the class have it.
    """
    of_class = doc.qualname.rpartition(".")[0]
    if of_class.endswith(("Adam", "AdamW", "AdaMax")) and doc.name not in OF_OPTIMIZERS:
        return False
    if doc.kind == "variable" and not of_class:
        return doc.name in getattr(sys.modules[doc.modulename], "__all__", ())
    if doc.name == "__init__":
        if getattr(getattr(sys.modules[doc.modulename], of_class, None), "_is_protocol", False):
            return False  # what a protocol is, no one makes
        return doc.docstring or doc.signature_without_self.parameters
    return not doc.name.startswith("_") and bool(not of_class or text_of(doc))


def text_of(doc):
    """Return what a page says of a name, as Markdown: its docstring, or of a field of a record the comment behind it."""
    text = "" if doc.docstring.startswith(("Alias for field number", "Create new instance of")) else doc.docstring
    if not text and doc.kind == "variable" and "." in doc.qualname:
        text = comment_of(doc)
    return text if doc.kind == "module" else arguments_apart(text)


def comment_of(field):
    """Return the comment that stands behind a field in the source of its class, or "" if there is none."""
    of_class, _, name = field.qualname.rpartition(".")
    try:
        source = inspect.getsource(operator.attrgetter(of_class)(sys.modules[field.modulename]))
    except (AttributeError, OSError, TypeError):
        return ""
    found = re.search(rf"^    {name}: .*?  # (.*)$", source, re.MULTILINE)
    return found[1] if found else ""


def arguments_apart(docstring):
    r"""Return the docstring of a function or a class as Markdown, in which each argument begins a line.

    An argument is names and a colon, which begin a line or follow a sentence; every other line continues the line above it.

    >>> arguments_apart("Add.\n\na, b: numbers, such as\n    2**3.\nout: where the\nsum is. axis: one.\n\n>>> add(1, 2, 3)\n3")
    'Add.\n\n**a, b:** numbers, such as 2\\*\\*3.  \n**out:** where the sum is.  \n**axis:** one.\n\n>>> add(1, 2, 3)\n3'
    """
    paragraphs = docstring.split("\n\n")
    for k, paragraph in enumerate(paragraphs):
        if not paragraph.startswith((">>>", "    ", "|", "* ", "- ", "```")):
            text = re.sub(rf"\n(?!{NAMES}: ) *", " ", paragraph)
            text = re.sub(rf"\. (?=[a-z]{NAMES}: )", ".\n", text).replace("\n", "  \n")
            text = re.sub(r"(`[^`]*`)|\*\*", lambda match: match[1] or r"\*\*", text)  # powers, not bold
            paragraphs[k] = re.sub(rf"^({NAMES}:) ", r"**\1** ", text, flags=re.MULTILINE)
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    warnings.simplefilter("error")
    # a key that a TypedDict inherits: at run time it has no base to look at
    warnings.filterwarnings("ignore", "Cannot determine where gpuadam.typing.Group.params is taken from")
    sys.path.insert(0, str(HERE.parent))
    main(*sys.argv[1:])
