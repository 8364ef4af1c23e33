{{/* The chart's own Valkey. Nothing in it may be evicted: what it holds is work that was promised. */}}

{{- define "millrace.valkeyConf" -}}
dir /data
aclfile /etc/valkey-users/users.acl
# Its users are the protection. With it, a server built with upstream's defaults answers nobody outside its pod, since the
# default user has no password; the official image turns it off in an entrypoint that this chart's command goes round.
protected-mode no
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

{{/* Asks as a service does: at the pod's address, as a service's user, and for a key that nobody else may see. A ping is
     answered to everybody, and on loopback even where no service gets in. */}}
{{- define "millrace.valkeyProbe" -}}
{{- $authority := .Values.redis.tlsSecret | empty | ternary "" "--cacert /etc/millrace/redis-tls/ca.crt " -}}
[sh, -c, 'valkey-cli -u "$PROBE_URL" -h "$POD_IP" {{ $authority }}--no-auth-warning xlen {{ include "millrace.namespace" . }}:generate | grep -q "^[0-9]"']
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
