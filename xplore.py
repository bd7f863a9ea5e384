import sys,json
sys.path[:0]=['benchmarks','modeling']
import torch, recall
from dataclasses import replace
spec=json.loads(sys.argv[1])
torch.set_num_threads(1)
variant=spec.pop('variant'); seed=spec.pop('seed',0); dev=spec.pop('device','cuda'); extra=spec.pop('extra',{}); mod=spec.pop('mod',{})
for k,v in mod.items(): setattr(recall,k,v)
recall.VARIANTS[variant]=recall.VARIANTS[variant]|extra
s=replace(recall.Settings(),**spec)
r=recall.train(variant,seed,s,dev)
print(sys.argv[1], r['steps'], 'limits',r['limits'], {k:round(v,3) for k,v in r['right'].items()}, flush=True)
