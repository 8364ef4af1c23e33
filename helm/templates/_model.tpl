{{/* Where the checkpoint is, and how to wait for one that is being fetched. */}}

{{- define "millrace.modelPath" -}}
{{- $download := .Values.model.download -}}
{{- $directory := .Values.model.subPath -}}
{{- if $download.repository -}}
{{- $directory = printf "%s/%s" ($download.repository | base) $download.revision -}}
{{- end -}}
{{- list "/model" $directory | compact | join "/" -}}
{{- end -}}

{{- define "millrace.modelNames" -}}
{{- kindIs "string" .Values.model.name | ternary (list .Values.model.name) .Values.model.name | toJson -}}
{{- end -}}

{{- define "millrace.modelName" -}}
{{- include "millrace.modelNames" . | fromJsonArray | first -}}
{{- end -}}

{{- define "millrace.modelVolume" -}}
{{- if .Values.model.hostPath -}}
hostPath:
  path: {{ .Values.model.hostPath }}
  type: Directory
{{- else -}}
persistentVolumeClaim:
  claimName: {{ .Values.model.existingClaim | default (include "millrace.name" (dict "root" . "component" "model")) }}
{{- end -}}
{{- end -}}

{{- define "millrace.initContainers" -}}
{{- if .root.Values.model.download.repository }}
initContainers:
  - name: wait-for-model
    image: {{ include "millrace.image" . }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [sh, -c, {{ printf "until [ -e '%s/.complete' ]; do sleep 2; done" (include "millrace.modelPath" .root) | quote }}]
    securityContext:
      {{- include "millrace.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 10m, memory: 16Mi}
      limits: {memory: 16Mi}
    volumeMounts:
      - name: model
        mountPath: /model
        readOnly: true
{{- end }}
{{- end -}}
