{{/* The parts of a pod that all four services, and the autoscaler, have alike. Each takes (dict "root" $ "component" NAME "config" MAP). */}}

{{- define "millrace.podAnnotations" -}}
checksum/model: {{ toJson .root.Values.model | sha256sum | trunc 16 }}
{{- if and (eq .component "gateway") .root.Values.apiKeys }}
checksum/api-keys: {{ toJson .root.Values.apiKeys | sha256sum | trunc 16 }}
{{- end }}
{{- with include "millrace.passwordGeneration" .root }}
{{ . }}
{{- end }}
{{- with .config.annotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Where it runs, and as whom. */}}
{{- define "millrace.podSpec" -}}
serviceAccountName: {{ include "millrace.name" . }}
automountServiceAccountToken: {{ has .component (list "autoscaler" "replicas") }}  # nobody else asks Kubernetes anything
enableServiceLinks: false  # they would be MILLRACE_ variables, which a service that knows no such setting refuses
securityContext:
  {{- include "millrace.podSecurity" . | nindent 2 }}
{{- with include "millrace.pullSecrets" .root }}
imagePullSecrets:
  {{- . | nindent 2 }}
{{- end }}
{{- with .config.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if and .config.gpus .root.Values.gpu.runtimeClassName }}
runtimeClassName: {{ .root.Values.gpu.runtimeClassName }}
{{- end }}
{{- include "millrace.placement" . }}
{{- end -}}

{{- define "millrace.placement" -}}
{{- with .config.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .config.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .config.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .config.spreadBy }}
topologySpreadConstraints:
  {{- range . }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "millrace.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "millrace.podSecurity" -}}
{{- $own := include "millrace.ownPodSecurity" . | fromYaml -}}
{{- include "millrace.overridden" (mergeOverwrite $own (.config.podSecurityContext | default dict | deepCopy)) -}}
{{- end -}}

{{- define "millrace.containerSecurity" -}}
{{- $own := include "millrace.ownContainerSecurity" . | fromYaml -}}
{{- include "millrace.overridden" (mergeOverwrite $own (.config.securityContext | default dict | deepCopy)) -}}
{{- end -}}

{{/* A map without the keys that an operator has set to null. */}}
{{- define "millrace.overridden" -}}
{{- $kept := dict -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $kept $key $value -}}{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}

{{- define "millrace.ownPodSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "millrace.ownContainerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "millrace.resources" -}}
{{- $own := include "millrace.ownResources" . | fromYaml -}}
{{- range $kind := list "requests" "limits" }}
{{ $kind }}:
  {{- include "millrace.overridden" (mergeOverwrite (index $own $kind) (dig $kind dict ($.config.resources | default dict) | default dict | deepCopy)) | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "millrace.ownResources" -}}
requests:
  cpu: {{ .config.cpu | quote }}
  memory: {{ .config.memory }}
limits:
  memory: {{ .config.memory }}
  {{- if .config.gpus }}
  {{ .root.Values.gpu.resource }}: {{ .config.gpus }}
  {{- end }}
{{- end -}}

{{/* Grace period: 10 s of what follows SIGTERM are for closing, as the services' own supervisor allows them. */}}
{{- define "millrace.grace" -}}
{{- add (int .config.preStopSeconds) (int .config.drainSeconds) -}}
{{- end -}}

{{- define "millrace.drain" -}}
{{- sub (int .config.drainSeconds) 10 -}}
{{- end -}}

{{- define "millrace.preStop" -}}
preStop:
  exec:
    command: [sleep, {{ .config.preStopSeconds | quote }}]
{{- end -}}

{{/* Settings as the services read them: text as it is, everything else as JSON. */}}
{{- define "millrace.settings" -}}
{{- range $name, $value := . }}
- name: MILLRACE_{{ upper $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end -}}

{{- define "millrace.env" -}}
- name: MILLRACE_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: MILLRACE_NAMESPACE
  value: {{ include "millrace.namespace" .root | quote }}
- name: MILLRACE_MODEL
  value: {{ include "millrace.modelPath" .root | quote }}
- name: MILLRACE_METRICS_PORT
  value: "8181"
- name: MILLRACE_DRAIN_S
  value: {{ include "millrace.drain" . | quote }}
{{- include "millrace.redisEnv" . }}
{{- include "millrace.settings" (omit (mergeOverwrite (deepCopy .root.Values.settings) (deepCopy .config.settings)) "namespace") }}
{{- range $name, $value := .config.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- with .config.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "millrace.mounts" -}}
- name: model
  mountPath: /model
  readOnly: true
{{ include "millrace.ownMounts" . }}
{{- end -}}

{{/* The same without the model. */}}
{{- define "millrace.ownMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .root.Values.redis.tlsSecret }}
- name: redis-tls
  mountPath: /etc/millrace/redis-tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "millrace.volumes" -}}
- name: model
  {{- include "millrace.modelVolume" .root | nindent 2 }}
{{ include "millrace.ownVolumes" . }}
{{- end -}}

{{- define "millrace.ownVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if .root.Values.redis.tlsSecret }}
- name: redis-tls
  secret:
    secretName: {{ .root.Values.redis.tlsSecret }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end -}}

{{/* The health command: a look at the replica's lease in Redis. A predecessor's lease under the same name has expired
     before the first look. */}}
{{- define "millrace.leaseProbes" -}}
{{- $lease := div (int (.root.Values.settings.lease_ms | default 3000)) 1000 -}}
startupProbe:
  exec:
    command: [python, -m, shared.health, {{ .component }}, ready]
  initialDelaySeconds: {{ add $lease 2 }}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: {{ div (int .config.startupSeconds) 5 }}
readinessProbe:
  exec:
    command: [python, -m, shared.health, {{ .component }}, ready]
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 2
livenessProbe:
  exec:
    command: [python, -m, shared.health, {{ .component }}, live]
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 4
{{- end -}}

{{- define "millrace.strategy" -}}
type: RollingUpdate
rollingUpdate:
  maxSurge: {{ .config.surge }}
  maxUnavailable: {{ if .config.surge }}0{{ else }}1{{ end }}
{{- end -}}

{{- define "millrace.disruption" -}}
{{- if .config.disruptionBudget }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "millrace.name" . }}
  labels:
    {{- include "millrace.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "millrace.selector" . | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "millrace.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "millrace.name" . }}
  labels:
    {{- include "millrace.labels" . | nindent 4 }}
  {{- with .config.serviceAccountAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
