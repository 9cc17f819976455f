"""The keeper: one process per machine that forks the ranks of gangs and leaves nothing behind.

``python -m ablate.cluster.keeper FD MODULES`` imports once what training needs (no accelerator
context), then forks every rank from itself: a fresh process per attempt that is training after
milliseconds. It is the subreaper of all that descends from its ranks, so a data loader or a daemon
that outlives its rank comes back to it and is killed. When its client goes away the socket ends,
and it kills everything and exits; when it is killed itself, the kernel kills its ranks
(PR_SET_PDEATHSIG).

``client`` is what a cluster holds (asyncio), ``server`` the process, ``rank`` what a fork becomes,
``wire`` what both ends know. Only the standard library and psutil are imported here.
"""
