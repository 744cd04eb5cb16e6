{{/* Name of an admission policy and of its binding: call with (dict "root" $ "policy" "secrets"). A colon, as in
     "weft.globalName", is not allowed there. */}}
{{- define "weft.policyName" -}}
{{ include "weft.name" .root }}-{{ .policy }}.{{ .root.Release.Namespace }}
{{- end -}}

{{- define "weft.operatorUser" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "weft.name" . }}
{{- end -}}

{{/* A policy's metadata; call as "weft.policyName". */}}
{{- define "weft.policyMetadata" -}}
name: {{ include "weft.policyName" . }}
labels: {{- include "weft.labels" (dict "root" .root "component" "admission") | nindent 2 }}
{{- end -}}

{{/* The namespaces in which policies about pods are in force. Kubernetes' own are left out even with `namespaces: All`. */}}
{{- define "weft.admissionNamespaces" -}}
{{- if eq (toString .Values.namespaces) "All" -}}
matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [kube-system, kube-public, kube-node-lease]}]
{{- else -}}
{{ include "weft.namespaceSelector" . }}
{{- end -}}
{{- end -}}

{{/* The namespaces that `namespaces: Labelled` keeps the operator out of. */}}
{{- define "weft.otherNamespaces" -}}
matchExpressions: [{key: weft.dev/enabled, operator: NotIn, values: ["true"]}]
{{- end -}}

{{/* Everything that has a pod template, for the rules of a policy. */}}
{{- define "weft.workloadRules" -}}
- apiGroups: [""]
  apiVersions: ["*"]
  operations: [CREATE, UPDATE]
  resources: [replicationcontrollers]
- apiGroups: [apps]
  apiVersions: ["*"]
  operations: [CREATE, UPDATE]
  resources: [deployments, statefulsets, daemonsets, replicasets]
- apiGroups: [batch]
  apiVersions: ["*"]
  operations: [CREATE, UPDATE]
  resources: [jobs, cronjobs]
- apiGroups: [""]
  apiVersions: ["*"]
  operations: [UPDATE]
  resources: [pods/ephemeralcontainers]
{{- end -}}

{{/* Holds for requests of people and their tools: neither of the operator, nor of the controllers that make pods of templates,
     which were judged when somebody wrote them. A controller manager without `--use-service-account-credentials` has one name. */}}
{{- define "weft.writtenByHand" -}}
{{- $trusted := list (include "weft.operatorUser" .) "system:kube-controller-manager" -}}
{{- range list "deployment" "replicaset" "statefulset" "daemon-set" "job" "cronjob" "replication" -}}
{{- $trusted = append $trusted (printf "system:serviceaccount:kube-system:%s-controller" .) -}}
{{- end -}}
{{- $trusted = concat $trusted .Values.admission.trusted -}}
- name: written-by-hand
  expression: >-
    !(has(request.userInfo.username) && request.userInfo.username in {{ toJson $trusted }})
{{- end -}}

{{/* CEL: the pod template in an object, a pod itself, else the object; call with "object" or "oldObject". `dyn` as the kinds
     differ in where they have it. */}}
{{- define "weft.celTemplate" -}}
dyn({{ . }}).?spec.?jobTemplate.?spec.?template.or(dyn({{ . }}).?spec.?template).orValue(dyn({{ . }}))
{{- end -}}

{{/* CEL: all containers of a pod spec; call with its expression. */}}
{{- define "weft.celContainers" -}}
{{ . }}.?containers.orValue([]) + {{ . }}.?initContainers.orValue([]) + {{ . }}.?ephemeralContainers.orValue([])
{{- end -}}

{{/* CEL: that a pod spec names a Secret for which a test holds; call with (list "spec" " in names"), the test as what follows. */}}
{{- define "weft.celNamesSecret" -}}
{{- $spec := index . 0 -}}{{- $test := index . 1 -}}
({{ $spec }}.?volumes.orValue([]).exists(v,
  v.?secret.?secretName.orValue(""){{ $test }}
  || v.?csi.?nodePublishSecretRef.?name.orValue(""){{ $test }}
  || v.?flexVolume.?secretRef.?name.orValue(""){{ $test }}
  || v.?projected.?sources.orValue([]).exists(s, s.?secret.?name.orValue(""){{ $test }}))
|| ({{ include "weft.celContainers" $spec }}).exists(c,
  c.?envFrom.orValue([]).exists(e, e.?secretRef.?name.orValue(""){{ $test }})
  || c.?env.orValue([]).exists(e, e.?valueFrom.?secretKeyRef.?name.orValue(""){{ $test }})))
{{- end -}}

{{/* CEL: that a pod spec names a volume claim for which a test holds, to mount it or to copy it; call as "weft.celNamesSecret". */}}
{{- define "weft.celNamesClaim" -}}
{{- $spec := index . 0 -}}{{- $test := index . 1 -}}
{{ $spec }}.?volumes.orValue([]).exists(v,
  v.?persistentVolumeClaim.?claimName.orValue(""){{ $test }}
  || v.?ephemeral.?volumeClaimTemplate.?spec.?dataSource.?name.orValue(""){{ $test }}
  || v.?ephemeral.?volumeClaimTemplate.?spec.?dataSourceRef.?name.orValue(""){{ $test }})
{{- end -}}

{{/* CEL: by which its containers reach Secrets in the pod spec `variables.NAME`, its ServiceAccount included. */}}
{{- define "weft.celReach" -}}
[
  dyn(variables.{{ . }}.?volumes.orValue([])),
  dyn(variables.{{ . }}.?serviceAccountName.orValue("")),
  dyn(variables.{{ . }}.?automountServiceAccountToken.orValue(true)),
  dyn(({{ include "weft.celContainers" (printf "variables.%s" .) }})
    .map(c, [
      dyn(c.name),
      dyn(c.?volumeMounts.orValue([])),
      dyn(c.?envFrom.orValue([]).filter(e, has(e.secretRef))),
      dyn(c.?env.orValue([]).filter(e, has(e.valueFrom) && has(e.valueFrom.secretKeyRef)))
    ])
    .filter(c, c[1] != [] || c[2] != [] || c[3] != []))
]
{{- end -}}

{{/* CEL: that label `k` of the map `variables.NAME` is one by which Weft, its policies and its watches know what is Weft's. */}}
{{- define "weft.celOwnLabel" -}}
(k.startsWith("weft.dev/") || (k == "app.kubernetes.io/managed-by" && variables.{{ . }}[k] == "weft"))
{{- end -}}

{{/* CEL: that every label of Weft's own in `variables.NEW` is in `variables.OLD`; call with (list "new" "old"). */}}
{{- define "weft.celNoOwnLabelBeside" -}}
{{- $new := index . 0 -}}{{- $old := index . 1 -}}
variables.{{ $new }}.all(k, !{{ include "weft.celOwnLabel" $new }} || (k in variables.{{ $old }} && variables.{{ $old }}[k] == variables.{{ $new }}[k]))
{{- end -}}
