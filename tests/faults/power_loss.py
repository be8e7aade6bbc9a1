"""What a disk may hold after the power went: every state that the calls of a broken_disk.Disk allow, the worst too.

Nothing is durable but by fsync: of a file its contents, of a folder the names in it. Contents that were not are as they
should be, as they were before, missing, half there, or zeros. Names that were not (made, renamed, removed) are each
done or not, whatever came first; a renaming is done whole. A real file system allows less.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from broken_disk import Call

Tree = dict[str, bytes | None]  # contents by path, None: a folder
SPOILT = {
    "as written": lambda kept, new: kept + new, "as before": lambda kept, new: kept,
    "half": lambda kept, new: kept + new[:len(new) // 2], "zeros": lambda kept, new: kept + bytes(len(new)),
}


class FileNode:
    """A file: its contents now, and those that are durable."""

    def __init__(self, data: bytes) -> None:
        self.now = self.durable = data

    def sync(self) -> None:
        """Make the contents durable."""
        self.durable = self.now

    def spoilt(self, how: str) -> bytes:
        """The contents after a crash; what was durable and not written over stays."""
        if self.now.startswith(self.durable):
            return SPOILT[how](self.durable, self.now[len(self.durable):])
        return self.durable if how == "as before" else SPOILT[how](b"", self.now)


class FolderNode:
    """A folder: what is in it now, and what is durably so."""

    def __init__(self) -> None:
        self.now: dict[str, FileNode | FolderNode] = {}
        self.durable: dict[str, FileNode | FolderNode] = {}


Change = tuple[FolderNode, dict[str, FileNode | FolderNode | None]]  # names in a folder, None: removed


class Memory:
    """A folder as the calls leave it, and the changes of names that are not durable yet."""

    def __init__(self, tree: Tree) -> None:
        self.root, self.changes = FolderNode(), list[Change]()
        for path in sorted(tree):
            data = tree[path]
            self._change(path, FolderNode() if data is None else FileNode(data))
        for folder, _ in self.changes:
            folder.durable = dict(folder.now)
        self.changes.clear()

    def find(self, path: str) -> FileNode | FolderNode:
        """What is at a path now."""
        node: FileNode | FolderNode = self.root
        for name in filter(None, path.split("/")):
            assert isinstance(node, FolderNode)
            node = node.now[name]
        return node

    def apply(self, call: Call) -> None:
        """Make a call."""
        kind, path = call.kind, call.path
        if kind == "open" and path not in self:
            self._change(path, FileNode(b""))
        elif kind == "mkdir":
            self._change(path, FolderNode())
        elif kind in ("unlink", "rmdir"):
            self._change(path, None)
        elif kind == "rename":
            self._rename(path, call.to)
        elif kind == "fsync":
            node = self.find(path)
            if isinstance(node, FileNode):
                node.sync()
            else:
                node.durable = dict(node.now)
                self.changes = [c for c in self.changes if c[0] is not node]
        elif kind in ("write", "truncate"):
            node = self.find(path)
            assert isinstance(node, FileNode)
            node.now = node.now[:call.at] + (b"" if kind == "truncate" else
                                             call.data + node.now[call.at + len(call.data):])

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self.find(folder).now

    def _change(self, path: str, node: FileNode | FolderNode | None, also: dict | None = None) -> None:
        parent, _, name = path.rpartition("/")
        folder = self.find(parent)
        assert isinstance(folder, FolderNode)
        change = {**(also or {}), name: node}
        self.changes.append((folder, change))
        folder.now = {k: v for k, v in {**folder.now, **change}.items() if v is not None}

    def _rename(self, path: str, to: str) -> None:
        folder, _, name = path.rpartition("/")
        assert folder == to.rpartition("/")[0], "names move within a folder here"
        self._change(to, self.find(path), {name: None})

    def states(self) -> Iterator[Tree]:
        """What the disk may hold if the power goes now."""
        for chosen in choices(len(self.changes)):
            for how in SPOILT:
                yield dict(self._tree(self.root, "", [self.changes[i] for i in chosen], how))

    def _tree(self, node: FolderNode, path: str, done: list[Change], how: str) -> Iterator[tuple[str, bytes | None]]:
        entries: dict[str, FileNode | FolderNode | None] = dict(node.durable)
        for folder, change in done:
            if folder is node:
                entries.update(change)
        for name, inner in entries.items():
            if isinstance(inner, FolderNode):
                yield path + name, None
                yield from self._tree(inner, f"{path}{name}/", done, how)
            elif inner is not None:
                yield path + name, inner.spoilt(how)


def choices(n: int) -> list[tuple[int, ...]]:
    """Which of n changes are done: every choice among few; else all, the first ones, one alone, all but one."""
    every = tuple(range(n))
    if n <= 6:
        return [c for size in range(n + 1) for c in itertools.combinations(every, size)]
    return [every, *(c for i in every for c in (every[:i], (i,), every[:i] + every[i + 1:]))]


def tree_of(folder: Path) -> Tree:
    """What a folder holds."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}


def plant(tree: Tree, folder: Path) -> Path:
    """Write a tree into a new folder."""
    folder.mkdir()
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
    return folder


def crashes(before: Tree, calls: list[Call]) -> list[tuple[int, list[str], Tree]]:
    """Every different state by the call before which the power goes: (call, what had been promised, state)."""
    memory, promised, found = Memory(before), list[str](), []
    seen: set[tuple] = set()
    for n in range(len(calls) + 1):
        for tree in memory.states():
            key = (len(promised), frozenset(tree.items()))
            if key not in seen:
                seen.add(key)
                found.append((n, list(promised), tree))
        if n < len(calls):
            if calls[n].kind == "promise":
                promised.append(calls[n].path)
            else:
                memory.apply(calls[n])
    return found
