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

{{/* What the operator reads at start: see operator/distill_operator/settings.py. */}}
{{- define "operator.settings" -}}
gitSha: {{ required "gitSha is empty: pass --set gitSha=$(git rev-parse HEAD), the commit that the images were built from" .Values.gitSha }}
images:
  trainer: {{ .Values.images.trainer }}
  inference: {{ .Values.images.inference }}
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

{{/* Rights in the namespaces of runs. */}}
{{- define "operator.rules" -}}
- apiGroups: [vpmoe.dev]
  resources: [distillruns]
  verbs: [get, list, watch, patch, delete]      # patch: our finalizer; delete: ttlAfterFinished
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
  resources: [secrets]                          # the one that a run's storage names
  verbs: [get]
- apiGroups: [""]
  resources: [pods]                             # why one waits or has failed
  verbs: [list]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end }}
