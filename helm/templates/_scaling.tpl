{{/* One scaler per service. `stream`: by how much work there is, waiting and running, which is the length of its stream
     (entries are deleted when their work has ended). `cpu`: by how busy it is. The built-in autoscaler scales the stages
     with a stream, and leaves the others to HPAs, which can do that without help. */}}

{{- define "millrace.scaler" -}}
{{- if eq .root.Values.autoscaling.kind "keda" }}
---
{{ include "millrace.scaledObject" . }}
{{- else if or (eq .root.Values.autoscaling.kind "hpa") (and (eq .root.Values.autoscaling.kind "builtin") (not .stream)) }}
---
{{ include "millrace.hpa" . }}
{{- end }}
{{- end -}}

{{- define "millrace.scaledObject" -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ include "millrace.name" . }}
  labels:
    {{- include "millrace.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    name: {{ include "millrace.name" . }}
  pollingInterval: 5
  cooldownPeriod: {{ .root.Values.autoscaling.cooldownSeconds }}
  minReplicaCount: {{ .config.replicas }}
  maxReplicaCount: {{ .config.maxReplicas }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- include "millrace.scaleDown" . | nindent 8 }}
  triggers:
    {{- if .stream }}
    {{- $sentinel := contains "+sentinel:" .root.Values.redis.external.url }}
    - type: {{ $sentinel | ternary "redis-sentinel-streams" "redis-streams" }}
      metadata:
        {{ $sentinel | ternary "addresses" "address" }}: {{ include "millrace.redisAddress" .root }}
        {{- if $sentinel }}
        sentinelMaster: {{ include "millrace.redisPath" .root | splitList "/" | first }}
        {{- end }}
        stream: {{ printf "%s:%s" (include "millrace.namespace" .root) .stream }}
        streamLength: {{ .config.target | quote }}
        activationLagCount: "0"
        databaseIndex: {{ include "millrace.redisDatabase" .root | quote }}
        enableTLS: {{ include "millrace.redisTls" .root | quote }}
      {{- if include "millrace.redisSecret" .root }}
      authenticationRef:
        name: {{ include "millrace.name" (dict "root" .root "component" "scaler") }}
      {{- end }}
    {{- else }}
    - type: cpu
      metricType: Utilization
      metadata:
        value: {{ .config.target | quote }}
    {{- end }}
{{- end -}}

{{- define "millrace.redisDatabase" -}}
{{- $path := include "millrace.redisPath" . | splitList "/" -}}
{{- contains "+sentinel:" .Values.redis.external.url | ternary (rest $path | first) (first $path) | default "0" -}}
{{- end -}}

{{/* What follows the address in the URL: DB, or NAME/DB. */}}
{{- define "millrace.redisPath" -}}
{{- regexReplaceAll "^[^:]+://[^/?]*/?([^?]*).*$" (.Values.redis.external.url | default "redis://x/0") "${1}" -}}
{{- end -}}

{{- define "millrace.hpa" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ include "millrace.name" . }}
  labels:
    {{- include "millrace.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "millrace.name" . }}
  minReplicas: {{ .config.replicas }}
  maxReplicas: {{ .config.maxReplicas }}
  behavior:
    {{- include "millrace.scaleDown" . | nindent 4 }}
  metrics:
    {{- if .stream }}
    - type: External
      external:
        metric:
          name: redis_stream_length
          selector:
            matchLabels:
              # A selector's values may not hold colons, as the stream's name does: the PodMonitor adds this label.
              stage: {{ .stream }}
              app_kubernetes_io_instance: {{ .root.Release.Name }}
        target:
          type: AverageValue
          averageValue: {{ .config.target | quote }}
    {{- else }}
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ .config.target }}
    {{- end }}
{{- end -}}

{{- define "millrace.scaleDown" -}}
scaleDown:
  stabilizationWindowSeconds: {{ .root.Values.autoscaling.cooldownSeconds }}
  policies:
    - type: Pods
      value: 1
      periodSeconds: 60
{{- end -}}

{{/* What the built-in autoscaler is told of the stages. */}}
{{- define "millrace.stages" -}}
{{- $stages := dict -}}
{{- range $service := list "mm_encoder" "engine" -}}
{{- $config := index $.Values $service -}}
{{- $deployment := include "millrace.name" (dict "root" $ "component" $service) -}}
{{- $_ := set $stages $service (dict "deployment" $deployment "target" (int $config.target) "least" (int $config.replicas) "most" (int $config.maxReplicas) "cooldown_s" (int $.Values.autoscaling.cooldownSeconds)) -}}
{{- end -}}
{{- toJson $stages -}}
{{- end -}}
