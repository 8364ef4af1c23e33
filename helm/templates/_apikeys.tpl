{{/* The keys clients must send, out of a Secret of the chart's or an existing one. */}}

{{- define "millrace.apiKeysSecret" -}}
{{- if .Values.apiKeys -}}
{{- include "millrace.name" (dict "root" . "component" "api-keys") -}}
{{- else -}}
{{- .Values.apiKeysSecret -}}
{{- end -}}
{{- end -}}

{{/* The file of keys, in a directory of its own: files that are mounted alone never change. */}}
{{- define "millrace.apiKeysFileMount" -}}
{{- if .Values.apiKeysFile.secret -}}
- name: api-keys
  mountPath: /etc/millrace/api-keys
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "millrace.apiKeysFileVolume" -}}
{{- with .Values.apiKeysFile.secret -}}
- name: api-keys
  secret:
    secretName: {{ . }}
{{- end -}}
{{- end -}}

{{- define "millrace.apiKeysFileEnv" -}}
{{- if .Values.apiKeysFile.secret -}}
- name: MILLRACE_API_KEYS_FILE
  value: {{ printf "/etc/millrace/api-keys/%s" .Values.apiKeysFile.key | quote }}
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
