{{/* The keys clients must send, out of a Secret of the chart's or an existing one. */}}

{{- define "millrace.apiKeysSecret" -}}
{{- if .Values.apiKeys -}}
{{- include "millrace.name" (dict "root" . "component" "api-keys") -}}
{{- else -}}
{{- .Values.apiKeysSecret -}}
{{- end -}}
{{- end -}}

{{- define "millrace.apiKeysEnv" -}}
{{- with include "millrace.apiKeysSecret" . -}}
- name: MILLRACE_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: keys
{{- end -}}
{{- end -}}
