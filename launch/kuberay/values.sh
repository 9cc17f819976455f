# What a RayJob of this cluster needs; copy it, change it, and name the copy: ABLATE_VALUES=my.sh.
# A variable of the same name in the environment goes before the value here.
: "${ABLATE_IMAGE:=ablate:0.1.0}"       # built from launch/Dockerfile, pushed where the cluster pulls
: "${ABLATE_CLAIM:=ablate}"             # PersistentVolumeClaim, ReadWriteMany: studies, runs, data
: "${ABLATE_NODES:=1}"                  # worker pods at most
: "${ABLATE_LEAST_NODES:=$ABLATE_NODES}" # fewer: Ray's autoscaler gives idle pods back, so that a
                                        # study's last trials do not hold all nodes
: "${ABLATE_CPUS:=16}"                  # per worker pod
: "${ABLATE_MEMORY:=128Gi}"             # per worker pod
: "${ABLATE_GPUS:=8}"                   # per worker pod
: "${ABLATE_SHM:=32Gi}"                 # /dev/shm of a worker pod: data loaders hand batches over there
: "${ABLATE_QUEUE:=}"                   # Kueue's LocalQueue; the job then waits, suspended, for quota
: "${ABLATE_PRIORITY:=}"                # PriorityClass of the pods
: "${ABLATE_NODE_SELECTOR:={\}}"        # JSON, e.g. {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
: "${ABLATE_NODE_LABELS:={\}}"          # JSON; labels that Ray gives the workers, for gang.labels (topology)
: "${ABLATE_DEADLINE_S:=604800}"        # the job ends after so long, whatever it does
: "${ABLATE_PODS_DEADLINE_S:=3600}"     # and after so long without its pods (KubeRay 1.6)
