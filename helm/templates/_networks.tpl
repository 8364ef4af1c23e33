{{/* Networks as lists of NetworkPolicy peers or egress rules. */}}

{{/* Whatever is not private, local to a link, carrier-grade NAT, multicast or reserved. mm-encoder checks each address
     by itself too; this holds even if it is broken into. */}}
{{- define "millrace.internet" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except: [0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, 192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/4, 240.0.0.0/4]
- ipBlock:
    cidr: 2000::/3
    except: [2001::/32, 2001:db8::/32, 2002::/16]
{{- end -}}

{{/* What the operator lets mm-encoder fetch from besides. */}}
{{- define "millrace.mediaNetworks" -}}
{{- range .Values.mm_encoder.settings.media_allow_networks }}
- ipBlock:
    cidr: {{ . }}
{{- else -}}
[]
{{- end }}
{{- end -}}

{{- define "millrace.externalRedis" -}}
{{- $ports := list }}
{{- range compact (list .Values.redis.external.url .Values.redis.external.blobUrl) }}
{{- range include "millrace.urlAddress" . | splitList "," }}
{{- $ports = append $ports (splitList ":" . | last) }}
{{- end -}}
{{- if contains "+sentinel:" . }}
{{- $ports = append $ports "6379" }}
{{- end -}}
{{- end -}}
- ports:
    {{- range uniq $ports }}
    - port: {{ . }}
      protocol: TCP
    {{- end }}
  {{- with .Values.redis.external.cidrs }}
  to:
    {{- range . }}
    - ipBlock:
        cidr: {{ . }}
    {{- end }}
  {{- end }}
{{- end -}}

{{/* The port of a URL that spans are sent to. */}}
{{- define "millrace.otlpPort" -}}
{{- $url := urlParse . -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (eq $url.scheme "https" | ternary "443" "80") -}}
{{- end -}}

{{/* Where the API server is; by default anywhere, on the ports that API servers have. */}}
{{- define "millrace.apiServer" -}}
{{- with .Values.networkPolicy.apiServer -}}
- to:
    {{- toYaml . | nindent 4 }}
{{- else -}}
- ports:
    {{- range list 443 6443 8443 16443 }}
    - port: {{ . }}
      protocol: TCP
    {{- end }}
{{- end -}}
{{- end -}}
