# SPDX-License-Identifier: Apache-2.0
"""Stand-in while the native op is built: same signature, reference only."""
from fastproto import reference
def proto_attention(feat, protos, offsets, *, temperature=0.05, eps=1e-6, concat=True, backend=None):
    return reference.proto_attention(feat, protos, offsets, temperature=temperature, eps=eps, concat=concat)
