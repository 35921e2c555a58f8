{{- define "operator.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{/* Name of the objects that belong to no namespace. */}}
{{- define "operator.clusterName" -}}
{{ .Release.Namespace }}-{{ include "operator.name" . }}
{{- end }}

{{- define "operator.account" -}}
{{- .Values.serviceAccountName | default (include "operator.name" .) }}
{{- end }}

{{- define "operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "operator.labels" -}}
{{- $ours := dict "app.kubernetes.io/part-of" "vpmoe" "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $helm := dict "app.kubernetes.io/managed-by" .Release.Service "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- toYaml (merge (include "operator.selector" . | fromYaml) (deepCopy .Values.labels) $ours $helm) }}
{{- end }}

{{/* Metadata of an object: (dict "root" $ "name" NAME), with its "namespace", and with labels and annotations of its own. */}}
{{- define "operator.metadata" -}}
name: {{ .name | quote }}
{{- with .namespace }}
namespace: {{ . | quote }}
{{- end }}
labels: {{- merge (deepCopy (.labels | default dict)) (include "operator.labels" .root | fromYaml) | toYaml | nindent 2 }}
{{- with merge (deepCopy (.annotations | default dict)) .root.Values.annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Fail with the remedy for every value that has no default, and for values that exclude each other. */}}
{{- define "operator.validate" -}}
{{- $problems := list }}
{{- $images := .Values.images }}
{{- if not (or $images.registry (and $images.operator $images.trainer $images.inference)) }}
{{- $problems = append $problems "images.registry is empty: pass the registry that holds the images operator, trainer and inference, --set images.registry=registry.example.com/vpmoe" }}
{{- end }}
{{- if and .Values.serviceAccountName .Values.serviceAccountAnnotations }}
{{- $problems = append $problems (printf "serviceAccountAnnotations are for the account that the chart creates, and serviceAccountName is %q: annotate that account yourself, or leave serviceAccountName empty" .Values.serviceAccountName) }}
{{- end }}
{{- if $problems }}{{ fail (printf "\n%s" (join "\n" $problems)) }}{{ end }}
{{- end }}

{{/* Image of (list . "operator"), "trainer" or "inference": its full reference if one is given, or else registry/name:tag. */}}
{{- define "operator.image" -}}
{{- $root := first . }}{{ $name := last . }}{{ $images := $root.Values.images -}}
{{- $default := printf "%s/%s:%s" (trimSuffix "/" (default "" $images.registry)) $name (default $root.Chart.AppVersion $images.tag) -}}
{{- default $default (get $images $name) }}
{{- end }}

{{/* The settings file of the operator: see operator/distill_operator/settings.py. */}}
{{- define "operator.settings" -}}
{{- include "operator.validate" . -}}
images:
  trainer: {{ include "operator.image" (list . "trainer") | quote }}
  inference: {{ include "operator.image" (list . "inference") | quote }}
lease:
  name: {{ include "operator.name" . | quote }}
  seconds: {{ toJson .Values.leaseSeconds }}
watchNamespaces: {{ toJson .Values.watchNamespaces }}
resyncSeconds: {{ toJson .Values.resyncSeconds }}
reconcileSeconds: {{ toJson .Values.reconcileSeconds }}
pollSeconds: {{ toJson .Values.pollSeconds }}
progressSeconds: {{ toJson .Values.progressSeconds }}
stuckSeconds: {{ toJson .Values.stuckSeconds }}
backoff: {{ toJson .Values.backoff }}
gpuResource: {{ .Values.gpuResource | quote }}
scheduling: {{ .Values.scheduling | quote }}
resources: {{ toJson .Values.jobResources }}
port: 8080
logLevel: {{ .Values.logLevel }}
{{- end }}

{{/* Permissions in the namespaces of runs. tests/cluster/test_used_permissions.py fails for one that is not used, and for one that is missing. */}}
{{- define "operator.rules" -}}
- apiGroups: [vpmoe.dev]
  resources: [distillruns]
  verbs: [get, list, watch, patch, delete]      # patch: the finalizer; delete: ttlAfterFinished
- apiGroups: [vpmoe.dev]
  resources: [distillruns/status, distillruns/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create]
- apiGroups: [""]
  resources: [pods]                             # where one serves progress, how it ended, why it waits, GPUs that others use
  verbs: [list]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end }}
