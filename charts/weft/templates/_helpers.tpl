{{/* Name of the operator's objects: the release's, with the chart's name in it. */}}
{{- define "weft.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "weft.natsName" -}}
{{ include "weft.name" . }}-nats
{{- end -}}

{{/* Name of what is outside the release's own namespace. */}}
{{- define "weft.globalName" -}}
{{ .Release.Namespace }}:{{ include "weft.name" . }}
{{- end -}}

{{/* Selector and labels of a component; call with (dict "root" $ "component" "operator"). */}}
{{- define "weft.selector" -}}
app.kubernetes.io/name: weft
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "weft.labels" -}}
{{ include "weft.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "weft.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* CPU and memory of the containers that the operator makes, as JSON: none where the value is null. */}}
{{- define "weft.resources" -}}
{{- $resources := dict -}}
{{- range list "database" "orchestrator" "relay" "setup" -}}
{{- $_ := set $resources . ((index $.Values .).resources | default dict) -}}
{{- end -}}
{{- toJson $resources -}}
{{- end -}}

{{/* What Pod Security `restricted` asks of a pod, and of a container. Weft's image has a user that is a number. */}}
{{- define "weft.podSecurity" -}}
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "weft.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* The label of a namespace that opts in (`namespaces: Labelled`), as KEY=VALUE. */}}
{{- define "weft.namespaceLabel" -}}
weft.dev/enabled=true
{{- end -}}

{{/* Selects the namespaces that the operator works in. */}}
{{- define "weft.namespaceSelector" -}}
{{- if kindIs "slice" .Values.namespaces -}}
matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .Values.namespaces }}}]
{{- else if eq .Values.namespaces "Labelled" -}}
matchLabels: {weft.dev/enabled: "true"}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Those of the listed namespaces that do not exist, or are being deleted: a Role in one of them would fail the release.
     Where no namespace at all is found there is no cluster (`helm template`), and none counts as missing. */}}
{{- define "weft.missingNamespaces" -}}
{{- $missing := list -}}
{{- $found := lookup "v1" "Namespace" "" .Release.Namespace -}}
{{- if kindIs "slice" .Values.namespaces -}}
{{- range without .Values.namespaces .Release.Namespace -}}
{{- $namespace := lookup "v1" "Namespace" "" . -}}
{{- if and $namespace (ne (dig "status" "phase" "" $namespace) "Terminating") -}}
{{- $found = $namespace -}}
{{- else -}}
{{- $missing = append $missing . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (ternary $missing list (not (empty $found))) -}}
{{- end -}}

{{/* Where Istio ambient has the kubelet's probes come from. */}}
{{- define "weft.ambientProbes" -}}
- ipBlock: {cidr: 169.254.7.127/32}
- ipBlock: {cidr: "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}
{{- end -}}

{{/* The ports that a connection arrives on when a mesh carries it: Istio ambient (HBONE), and Linkerd's proxy. */}}
{{- define "weft.meshPorts" -}}
[{port: 15008, protocol: TCP}, {port: 4143, protocol: TCP}]
{{- end -}}

{{/* What the operator may do in a namespace that it works in; docs/security.md has the reason of each rule. */}}
{{- define "weft.rules" -}}
- apiGroups: [weft.dev]
  resources: [microservices, outboxrelays]
  verbs: [list, watch]
# The finalizer of a Saga.
- apiGroups: [weft.dev]
  resources: [sagas]
  verbs: [list, watch, patch]
- apiGroups: [weft.dev]
  resources: [microservices/status, outboxrelays/status, sagas/status]
  verbs: [patch]
# Server-side apply asks for `create` and `patch`. A Job is never changed.
- apiGroups: [apps]
  resources: [deployments, statefulsets]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, delete]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [list, watch, create, patch, delete]
# An annotation on a pod has its kubelet refresh the contract that the pod mounts.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, patch]
# A Secret is made when it is missing. It is never read: the operator has no use for a password.
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
# Its own; and why a pod waits for a volume is said in Events alone.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [list, create, patch]
{{- end }}

{{- define "weft.natsConfig" -}}
nats.conf: |
  server_name: $POD_NAME
  # ports without an address: all addresses of the pod, of IPv4 and of IPv6
  port: 4222
  http_port: 8222
  max_payload: {{ .Values.nats.maxPayload }}
  # an account for each namespace, and none for whoever has no credentials
  include accounts.conf
  jetstream {
    store_dir: /data
    max_memory_store: 64MB
    # full by its own count before the volume is: it then refuses politely what comes, and goes on by itself
    {{- $size := regexFind "^[0-9]+" .Values.nats.storage.size | int64 }}
    {{- if hasSuffix "Ti" .Values.nats.storage.size }}{{ $size = mul $size 1048576 }}
    {{- else if hasSuffix "Gi" .Values.nats.storage.size }}{{ $size = mul $size 1024 }}
    {{- end }}
    max_file_store: {{ div (mul $size 85) 100 }}MiB
    sync_interval: {{ .Values.nats.syncInterval }}
  }
{{- end -}}
