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
{{- if or .root.Values.model.download.repository .config.initContainers }}
initContainers:
  {{- if .root.Values.model.download.repository }}
  - name: wait-for-model
    image: {{ include "millrace.image" . }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: [sh, -c]
    args:
      - |
        {{- include "millrace.waitForModel" .root | nindent 8 }}
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
  {{- with .config.initContainers }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Waits for the download, says what for whenever that changes, and ends at once when it is told to. */}}
{{- define "millrace.waitForModel" -}}
path='{{ include "millrace.modelPath" . }}'
trap 'exit 143' TERM INT
until [ -e "$path/.complete" ]; do
  state=$(cat "$path/.state" 2>/dev/null || echo 'it has not begun')
  if [ "$state" != "$said" ]; then
    echo "waiting for $path, which the pod with app.kubernetes.io/component=model fetches: $state"
    said=$state
  fi
  sleep 2 & wait $!
done
{{- end -}}

{{/* A Job cannot be changed, so one whose pod is another has another name; and so has one that is to follow a Job that
     Kubernetes has given up: the files it has fetched are kept, and the next goes on with them. */}}
{{- define "millrace.modelJob" -}}
{{- $name := printf "%s-%s" (include "millrace.name" (dict "root" . "component" "model")) (include "millrace.modelPod" . | sha256sum | trunc 8) -}}
{{- $live := lookup "batch/v1" "Job" .Release.Namespace $name | default dict -}}
{{- range dig "status" "conditions" list $live -}}
{{- if and (eq .type "Failed") (eq .status "True") -}}
{{- $name = printf "%s-%d" $name (int $.Release.Revision) -}}
{{- end -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* The pod of the download's Job. */}}
{{- define "millrace.modelPod" -}}
{{- $download := .Values.model.download -}}
{{- $model := dict "root" . "component" "model" "config" .Values.pods -}}
metadata:
  labels:
    {{- include "millrace.labels" $model | nindent 4 }}
spec:
  {{- include "millrace.podSpec" $model | nindent 2 }}
  restartPolicy: OnFailure
  containers:
    - name: fetch
      image: {{ include "millrace.image" (dict "root" . "component" "postproc") }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python, /etc/millrace/fetch_model.py]
      args:
        - {{ $download.endpoint | quote }}
        - {{ $download.repository | quote }}
        - {{ $download.revision | quote }}
        - {{ include "millrace.modelPath" . | quote }}
      {{- with $download.tokenSecret }}
      env:
        - name: HUB_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ . }}
              key: token
      {{- end }}
      securityContext:
        {{- include "millrace.containerSecurity" $model | nindent 8 }}
      resources:
        requests: {cpu: "1", memory: 512Mi}
        limits: {memory: 512Mi}
      volumeMounts:
        - name: model
          mountPath: /model
        - name: script
          mountPath: /etc/millrace
          readOnly: true
  volumes:
    - name: model
      persistentVolumeClaim:
        claimName: {{ include "millrace.name" $model }}
    - name: script
      configMap:
        name: {{ include "millrace.name" $model }}
{{- end -}}
