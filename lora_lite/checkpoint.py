"""PLACEHOLDER by the lead so that the package imports: the checkpoint helper overwrites this file."""
import copy, os
class CheckpointError(ValueError): pass
class Contents:
    def __init__(self,config,tensors,also,fingerprint,metadata,diagnostics): self.__dict__.update(locals())
STORE={}
def write(path,contents): STORE[os.fspath(path)]=copy.deepcopy(contents)
def read(path): return copy.deepcopy(STORE[os.fspath(path)])
def renamed(c,names): return c
def check_tensors(c,w):
    for t in w:
        for f in w[t]:
            if tuple(c.tensors[t][f].shape)!=tuple(w[t][f]): raise CheckpointError(f)
