{{- define "operator.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "operator.account" -}}
{{- .Values.serviceAccountName | default (include "operator.name" .) }}
{{- end }}

{{- define "operator.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: vpmoe
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "operator.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Fail with the remedy for every value that has no default. */}}
{{- define "operator.validate" -}}
{{- $problems := list }}
{{- if not (regexMatch "^[0-9a-f]{40}$" .Values.gitSha) }}
{{- $problems = append $problems (printf "gitSha is %q, not a commit of 40 hexadecimal digits: pass the commit that the images were built from, --set gitSha=$(git rev-parse HEAD)" .Values.gitSha) }}
{{- end }}
{{- $images := .Values.images }}
{{- if not (or $images.registry (and $images.operator $images.trainer $images.inference)) }}
{{- $problems = append $problems "images.registry is empty: pass the registry that holds the images operator, trainer and inference, --set images.registry=registry.example.com/vpmoe" }}
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
gitSha: {{ .Values.gitSha | quote }}
images:
  trainer: {{ include "operator.image" (list . "trainer") }}
  inference: {{ include "operator.image" (list . "inference") }}
lease:
  name: {{ include "operator.name" . }}
  seconds: {{ .Values.leaseSeconds }}
watchNamespaces: {{ toJson .Values.watchNamespaces }}
resyncSeconds: {{ .Values.resyncSeconds }}
stuckSeconds: {{ .Values.stuckSeconds }}
backoff: {{ toJson .Values.backoff }}
resources: {{ toJson .Values.jobResources }}
port: 8080
logLevel: {{ .Values.logLevel }}
{{- end }}

{{/* Permissions in the namespaces of runs. */}}
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
  resources: [secrets]                          # those that spec.storage names
  verbs: [get]
- apiGroups: [""]
  resources: [pods]                             # to explain why one waits or has failed
  verbs: [list]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end }}
