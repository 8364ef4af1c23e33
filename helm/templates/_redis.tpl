{{/* How the services reach Redis: the chart's own Valkey, or one that is there already. Each service has a URL of its
     own, so that it can be a user of its own. */}}

{{- define "millrace.redisHost" -}}
{{- printf "%s.%s.svc" (include "millrace.name" (dict "root" . "component" "redis")) .Release.Namespace -}}
{{- end -}}

{{- define "millrace.redisSecret" -}}
{{- if .Values.redis.existingSecret -}}
{{- .Values.redis.existingSecret -}}
{{- else if not .Values.redis.external.url -}}
{{- include "millrace.name" (dict "root" . "component" "redis") -}}
{{- end -}}
{{- end -}}

{{- define "millrace.redisCa" -}}
{{- if .Values.redis.tlsSecret }}?ssl_ca_certs=/etc/millrace/redis-tls/ca.crt{{ end -}}
{{- end -}}

{{- define "millrace.redisEnv" -}}
{{- $secret := include "millrace.redisSecret" .root -}}
{{- $external := .root.Values.redis.external -}}
{{- $key := .component | replace "_" "-" }}
- name: MILLRACE_REDIS_URL
{{- if $secret }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $key }}
{{- else }}
  value: {{ printf "%s%s" $external.url (include "millrace.redisCa" .root) | quote }}
{{- end }}
{{- if and $external.blobUrl (not (has .component (list "postproc" "autoscaler"))) }}
- name: MILLRACE_BLOB_REDIS_URL
{{- if $secret }}
  valueFrom:
    secretKeyRef:
      name: {{ $secret }}
      key: {{ $key }}-blobs
{{- else }}
  value: {{ printf "%s%s" $external.blobUrl (include "millrace.redisCa" .root) | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* HOST:PORT of a Redis URL; of one for Sentinels all of them, separated by commas. */}}
{{- define "millrace.urlAddress" -}}
{{- $port := contains "+sentinel:" . | ternary 26379 6379 -}}
{{- $hosts := list -}}
{{- range regexReplaceAll "^[^:]+://([^/?]*).*$" . "${1}" | splitList "," -}}
{{- $hosts = append $hosts (regexMatch ":[0-9]+$" . | ternary . (printf "%s:%d" . $port)) -}}
{{- end -}}
{{- join "," $hosts -}}
{{- end -}}

{{- define "millrace.redisAddress" -}}
{{- if .Values.redis.external.url -}}
{{- include "millrace.urlAddress" .Values.redis.external.url -}}
{{- else -}}
{{- include "millrace.redisHost" . }}:6379
{{- end -}}
{{- end -}}

{{- define "millrace.redisTls" -}}
{{- if .Values.redis.external.url -}}
{{- hasPrefix "rediss" .Values.redis.external.url -}}
{{- else -}}
{{- not (empty .Values.redis.tlsSecret) -}}
{{- end -}}
{{- end -}}

{{/* Restarts what has logged in, or lets in, when the passwords of the chart's Valkey are replaced. */}}
{{- define "millrace.passwordGeneration" -}}
{{- if not (or .Values.redis.external.url .Values.redis.existingSecret) -}}
millrace/redis-passwords: {{ .Values.redis.passwordGeneration | quote }}
{{- end -}}
{{- end -}}

{{/* A user's passwords: the present one and, from one generation to the next, the one before it, with which pods that
     have not been restarted yet log in again. */}}
{{- define "millrace.redisPasswords" -}}
#{{ index .passwords .user | default "" | sha256sum }}
{{- with index .previous .user }} #{{ . | sha256sum }}{{ end -}}
{{- end -}}

{{/* The users of the chart's Valkey. Services may do all that is not administration, within the release's keys, and INFO. Without
     passwords it serves to tell whether the users' rights have changed. */}}
{{- define "millrace.redisAcl" -}}
{{- $keys := printf "~%s:*" (include "millrace.namespace" .root) -}}
user default on nopass resetkeys resetchannels -@all +ping
{{- range list "gateway" "mm-encoder" "engine" "postproc" }}
user {{ . }} on {{ include "millrace.redisPasswords" (merge (dict "user" .) $) }} {{ $keys }} resetchannels +@all -@admin -@dangerous +info
{{- end }}
user scaler on {{ include "millrace.redisPasswords" (merge (dict "user" "scaler") .) }} {{ $keys }} resetchannels -@all +@connection +info +xlen
user monitor on {{ include "millrace.redisPasswords" (merge (dict "user" "monitor") .) }} {{ $keys }} resetchannels -@all +@connection +info +config|get +slowlog|len +slowlog|get +latency|latest +type +scard +xinfo
user viewer on {{ include "millrace.redisPasswords" (merge (dict "user" "viewer") .) }} {{ $keys }} resetchannels -@all +@connection +@read +info +eval +time
user autoscaler on {{ include "millrace.redisPasswords" (merge (dict "user" "autoscaler") .) }} {{ $keys }} resetchannels -@all +@connection +@read +info +eval +evalsha +script|load +time +set +del
{{- end -}}
