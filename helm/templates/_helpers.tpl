{{/* Names and labels. A service's key in the values has underscores, as its Python package; objects have hyphens. */}}

{{- define "millrace.fullname" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name -}}
{{- $name := .Values.fullnameOverride | default (contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart)) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "millrace.name" -}}
{{- printf "%s-%s" (include "millrace.fullname" .root) (.component | replace "_" "-") -}}
{{- end -}}

{{- define "millrace.selector" -}}
app.kubernetes.io/name: millrace
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component | replace "_" "-" }}
{{- end -}}

{{- define "millrace.labels" -}}
{{ include "millrace.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a service's pods: those that select it, and what the operator adds. */}}
{{- define "millrace.podLabels" -}}
{{ include "millrace.selector" . }}
{{- with merge (dict) (.config.labels | default dict) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The image of a service, or of the autoscaler. */}}
{{- define "millrace.image" -}}
{{- $image := (index .root.Values .component | default dict).image | default (include "millrace.ownImage" .) -}}
{{- include "millrace.fromRegistry" (dict "root" .root "image" $image) -}}
{{- end -}}

{{/* An image's name with its registry replaced by the global one. A name's first part is a registry if it has a dot or a
     port, or is localhost; there is none in a name of one part. */}}
{{- define "millrace.fromRegistry" -}}
{{- $registry := (.root.Values.global | default dict).imageRegistry | default "" | trimSuffix "/" -}}
{{- if $registry -}}
{{- printf "%s/%s" $registry (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" .image "") -}}
{{- else -}}
{{- .image -}}
{{- end -}}
{{- end -}}

{{- define "millrace.pullSecrets" -}}
{{- $secrets := list -}}
{{- $global := (.Values.global | default dict).imagePullSecrets | default list -}}
{{- range concat $global (.Values.image.pullSecrets | default list) -}}
{{- $secrets = append $secrets (kindIs "string" . | ternary (dict "name" .) .) -}}
{{- end -}}
{{- with uniq $secrets }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "millrace.ownImage" -}}
{{- $repository := printf "millrace-%s" (.component | replace "_" "-") -}}
{{- with .root.Values.image.registry }}{{- $repository = printf "%s/%s" (. | trimSuffix "/") $repository -}}{{- end -}}
{{- printf "%s:%s" $repository (.root.Values.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}

{{/* A service's values: those of all pods, with its own on top. */}}
{{- define "millrace.config" -}}
{{- mergeOverwrite (deepCopy .root.Values.pods) (deepCopy (index .root.Values .component)) | toYaml -}}
{{- end -}}

{{/* The prefix of all keys in Redis: of this release alone, so that releases can share a Redis. */}}
{{- define "millrace.namespace" -}}
{{- .Values.settings.namespace | default (printf "%s.%s" .Release.Namespace (include "millrace.fullname" .)) -}}
{{- end -}}

{{- define "millrace.requestTimeout" -}}
{{- int (.Values.gateway.settings.request_timeout_s | default 600) -}}
{{- end -}}

{{/* What keeps an installation from working, said before anything is installed. */}}
{{- define "millrace.check" -}}
{{- $model := .Values.model -}}
{{- $sources := list $model.existingClaim $model.hostPath $model.download.repository | compact -}}
{{- if ne (len $sources) 1 -}}
{{- fail "say where the model is: exactly one of model.existingClaim, model.hostPath and model.download.repository" -}}
{{- end -}}
{{- if and .Values.apiKeys .Values.apiKeysSecret -}}
{{- fail "apiKeys and apiKeysSecret exclude each other" -}}
{{- end -}}
{{- if and .Values.redis.external.blobUrl (not .Values.redis.external.url) -}}
{{- fail "redis.external.blobUrl needs redis.external.url" -}}
{{- end -}}
{{- if contains "@" .Values.redis.external.url -}}
{{- fail "redis.external.url must not hold a password: put URLs with passwords into redis.existingSecret" -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.kind "hpa") (has 0 (list (int .Values.mm_encoder.replicas) (int .Values.engine.replicas))) -}}
{{- fail "an HPA cannot scale to zero or from zero: replicas must be 1 or more, or autoscaling.kind keda" -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.kind "none") (has 0 (list (int .Values.gateway.replicas) (int .Values.postproc.replicas))) -}}
{{- fail "gateway and postproc scale by cpu, which one that sleeps does not use: their replicas must be 1 or more" -}}
{{- end -}}
{{- include "millrace.checkSettings" . -}}
{{- include "millrace.checkMedia" . -}}
{{- range $service := list "gateway" "mm_encoder" "engine" "postproc" -}}
{{- $config := index $.Values $service -}}
{{- if and (ne $.Values.autoscaling.kind "none") (gt (int $config.replicas) (int $config.maxReplicas)) -}}
{{- fail (printf "%s.replicas is more than %s.maxReplicas" $service $service) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Settings that contradict each other or the pod, which a service would say by ending. Defaults are the services'. */}}
{{- define "millrace.checkSettings" -}}
{{- $engine := .Values.engine.settings -}}
{{- $gpus := int (include "millrace.config" (dict "root" . "component" "engine") | fromYaml).gpus -}}
{{- $devices := int ($engine.tensor_parallel_size | default (max $gpus 1)) -}}
{{- if ne $devices (max $gpus 1 | int) -}}
{{- fail (printf "engine.settings.tensor_parallel_size is %d, and engine.gpus %d; leave it out, and it is as many as the pod has" $devices $gpus) -}}
{{- else if not (has $devices (list 1 2 4)) -}}
{{- fail (printf "engine.gpus is %d; an engine computes on 1, 2 or 4, and more GPUs are for more engines (engine.replicas)" $gpus) -}}
{{- end -}}
{{- $step := int ($engine.max_num_batched_tokens | default 0) -}}
{{- $guesses := int (dig "num_speculative_tokens" 0 ($engine.speculative_config | default dict)) -}}
{{- $sequences := int ($engine.max_num_seqs | default 32) -}}
{{- if ge $guesses $sequences -}}
{{- fail (printf "engine.settings.speculative_config has num_speculative_tokens %d; a step samples max_num_seqs (%d) tokens at most, of which one is no guess" $guesses $sequences) -}}
{{- end -}}
{{- $context := int (.Values.settings.max_model_len | default 32768) -}}
{{- if and (eq (toString $engine.enable_chunked_prefill) "false") (gt $step 0) (lt $step $context) -}}
{{- fail (printf "engine.settings.enable_chunked_prefill is false, so a prompt must fit into one step: max_num_batched_tokens is %d, and settings.max_model_len %d" $step $context) -}}
{{- end -}}
{{- $body := int64 (.Values.gateway.settings.max_body_bytes | default 134217728) -}}
{{- $bodies := int64 (.Values.gateway.settings.max_bodies_bytes | default 201326592) -}}
{{- if gt (mul $body 4) (mul $bodies 3) -}}
{{- fail (printf "gateway.settings.max_body_bytes is %d, more than three quarters of max_bodies_bytes, %d" $body $bodies) -}}
{{- end -}}
{{- end -}}

{{/* The same of the sizes of images and the frames of videos. */}}
{{- define "millrace.checkMedia" -}}
{{- $told := .Values.mm_encoder.settings.mm_processor_kwargs | default dict -}}
{{- $where := "mm_encoder.settings.mm_processor_kwargs" -}}
{{- range $kind, $sizes := dict "image" (list 3136 4842768) "video" (list 234416 937664) -}}
{{- $low := int64 (dig (printf "%s_min_pixels" $kind) (first $sizes) $told) -}}
{{- $high := int64 (dig (printf "%s_max_pixels" $kind) (last $sizes) $told) -}}
{{- if or (lt $low 1) (gt $low $high) -}}
{{- fail (printf "%s: %s_min_pixels must be positive and at most %s_max_pixels: %d, %d" $where $kind $kind $low $high) -}}
{{- end -}}
{{- end -}}
{{- $low := int (dig "video_min_frames" 16 $told) -}}
{{- $high := int (dig "video_max_frames" 180 $told) -}}
{{- $target := int (dig "video_target_frames" -1 $told) -}}
{{- $fps := int (dig "video_fps" (gt $target 0 | ternary -1 2) $told) -}}
{{- if and (gt $high 0) (gt $low $high) -}}
{{- fail (printf "%s: video_min_frames is %d, and video_max_frames %d" $where $low $high) -}}
{{- else if and (le $target 0) (le $fps 0) -}}
{{- fail (printf "%s: video_fps or video_target_frames must be positive" $where) -}}
{{- else if and (gt $target 0) (ge $fps 0) -}}
{{- fail (printf "%s: video_fps and video_target_frames exclude each other" $where) -}}
{{- else if and (gt $target 0) (or (lt $target $low) (and (gt $high 0) (gt $target $high))) -}}
{{- fail (printf "%s: video_target_frames is %d, not within video_min_frames and video_max_frames" $where $target) -}}
{{- end -}}
{{- end -}}
