"""A JSON schema of the JobSet of jobset.x-k8s.io/v1alpha2.

Written from its API reference, for the fields that a manifest of ours may want: it is not the
controller's own schema. What is inside a Job is Kubernetes' to check.
"""

_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def _object(required: tuple[str, ...] = (), **properties) -> dict:
    return {
        "type": "object", "additionalProperties": False,
        "required": list(required), "properties": properties,
    }  # fmt: skip


JOBSET = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(
        ("name",),
        name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        namespace=_TEXT,
        labels={"type": "object", "additionalProperties": _TEXT},
        annotations={"type": "object", "additionalProperties": _TEXT},
    ),
    spec=_object(
        ("replicatedJobs",),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ("name", "template"),
                name=_TEXT, groupName=_TEXT, replicas=_COUNT, template={"type": "object"},
                dependsOn={"type": "array"},
            ),
        },
        failurePolicy=_object(
            maxRestarts=_COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={
                "type": "array",
                "items": _object(
                    ("name", "action"),
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={
                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                    },
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                                "MaxFailedIndexesExceeded", "PodFailurePolicy",
                            ]
                        },
                    },
                    targetReplicatedJobs={"type": "array", "items": _TEXT},
                ),
            },
        ),
        network=_object(
            enableDNSHostnames={"type": "boolean"}, subdomain=_TEXT,
            publishNotReadyAddresses={"type": "boolean"},
        ),
        successPolicy={"type": "object"},
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
    ),
)  # fmt: skip
