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

{{/* The users of the chart's Valkey: files/users.acl, with the release's namespace and with passwords. Without these it
     serves to tell whether the users' rights have changed. */}}
{{- define "millrace.redisAcl" -}}
{{- $namespace := printf "%s:" (include "millrace.namespace" .root) -}}
user default on nopass resetkeys resetchannels -@all +ping
{{- range $line := .root.Files.Lines "files/users.acl" }}
{{- if hasPrefix "user " $line }}
{{ $line }} on {{ include "millrace.redisPasswords" (merge (dict "user" (trimPrefix "user " $line)) $) }}
{{- else if hasPrefix " " $line }}
{{- $line | replace "NS:" $namespace }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "millrace.redisUsers" -}}
{{- range regexFindAll "(?m)^user .*" (.Files.Get "files/users.acl") -1 }}{{ trimPrefix "user" . }}{{ end -}}
{{- end -}}
