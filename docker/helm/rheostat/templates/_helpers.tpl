{{- define "rheostat.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "rheostat.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "rheostat.labels" -}}
{{ include "rheostat.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "rheostat.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{- /* The volume source that holds policies.yaml; empty without policies. */ -}}
{{- define "rheostat.policies" -}}
{{- with .Values.policies -}}
{{- if gt (len (compact (list .file .configMap .secret))) 1 -}}
{{- fail "policies: set one of file, configMap and secret" -}}
{{- end -}}
{{- if .secret -}}
secret: {secretName: {{ .secret }}}
{{- else if .configMap -}}
configMap: {name: {{ .configMap }}}
{{- else if .file -}}
configMap: {name: {{ include "rheostat.fullname" $ }}-policies}
{{- end -}}
{{- end -}}
{{- end -}}
