{{/* The chart's own Valkey. Nothing in it may be evicted: what it holds is work that was promised. */}}

{{- define "millrace.valkeyConf" -}}
dir /data
aclfile /etc/valkey-users/users.acl
maxmemory {{ .Values.redis.maxMemoryMb }}mb
maxmemory-policy noeviction
save ""
appendonly {{ if .Values.redis.size }}yes{{ else }}no{{ end }}
appendfsync everysec
{{- if .Values.redis.tlsSecret }}
port 0
tls-port 6379
tls-cert-file /etc/millrace/redis-tls/tls.crt
tls-key-file /etc/millrace/redis-tls/tls.key
tls-ca-cert-file /etc/millrace/redis-tls/ca.crt
tls-auth-clients no
{{- end }}
{{- end -}}

{{- define "millrace.valkeyPing" -}}
{{- $tls := .Values.redis.tlsSecret | empty | ternary "" "--tls --insecure " -}}
[sh, -c, "valkey-cli {{ $tls }}ping | grep -q PONG"]
{{- end -}}

{{/* What the exporter looks at by name, without a scan over all keys. */}}
{{- define "millrace.watchedStreams" -}}
{{- $keys := include "millrace.namespace" . -}}
{{- printf "%s:encode,%s:generate,%s:quarantine:encode,%s:quarantine:generate" $keys $keys $keys $keys | quote -}}
{{- end -}}

{{- define "millrace.watchedKeys" -}}
{{- $keys := include "millrace.namespace" . -}}
{{- printf "%s:replicas:gateway,%s:replicas:mm_encoder,%s:replicas:engine,%s:replicas:postproc" $keys $keys $keys $keys | quote -}}
{{- end -}}
