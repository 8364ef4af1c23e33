{{/* Who says how many replicas a stage has, without a fight over the field. Somebody else than the chart may set the
     number at any time (kubectl, an HPA, an autoscaler), and then owns .spec.replicas: Helm 4, which applies
     server-side, may not apply another one, and an apply that is refused leaves the release half upgraded. So

     - the chart applies its own number while nobody else has set one;
     - then it applies the number that it finds, which is no conflict;
     - a number in the values that is another than at the last upgrade, which an annotation remembers, is set after the
       upgrade by a hook (replicas.yaml), through the scale subresource, where the last word counts;
     - with a scaler the chart names no number, except one that it named before and nobody has changed since: a field
       that its only owner no longer names goes back to 1.

     A stage is seen as it is in the cluster, so `helm template` renders the chart's own numbers. Each takes the same as
     the parts of a pod. */}}

{{- define "millrace.live" -}}
{{- lookup "apps/v1" "Deployment" .root.Release.Namespace (include "millrace.name" .) | default dict | toJson -}}
{{- end -}}

{{/* The owners of .spec.replicas in a Deployment: `scalers` own it alone, `declared` says that one owns the pods' template
     with it, as whoever applies the whole object does. */}}
{{- define "millrace.replicasOwners" -}}
{{- $scalers := list -}}
{{- $declared := false -}}
{{- range dig "metadata" "managedFields" list . -}}
{{- $owned := dig "fieldsV1" "f:spec" dict . -}}
{{- if hasKey $owned "f:replicas" -}}
{{- if hasKey $owned "f:template" -}}
{{- $declared = true -}}
{{- else -}}
{{- $scalers = append $scalers .manager -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- dict "scalers" $scalers "declared" $declared | toJson -}}
{{- end -}}

{{- define "millrace.replicas" -}}
{{- $live := include "millrace.live" . | fromJson -}}
{{- $owners := include "millrace.replicasOwners" $live | fromJson -}}
{{- $own := eq .root.Values.autoscaling.kind "none" -}}
{{- $number := dig "spec" "replicas" 0 $live -}}
{{- if and $own (not $owners.scalers) -}}
replicas: {{ .config.replicas }}
{{- else if $own -}}
replicas: {{ $number }}
{{- else if and $live (or (and $owners.declared (not $owners.scalers)) (semverCompare "<4.0.0-0" .root.Capabilities.HelmVersion.Version)) -}}
replicas: {{ $number }}  # Helm 3 applies no owners, and would take away a number that an earlier release named
{{- end -}}
{{- end -}}

{{- define "millrace.replicasAnnotation" -}}
{{- if eq .root.Values.autoscaling.kind "none" -}}
annotations:
  millrace/replicas: {{ .config.replicas | quote }}
{{- end -}}
{{- end -}}

{{/* How many replicas a stage that somebody else has scaled should have from now on; empty: as many as it has. */}}
{{- define "millrace.newReplicas" -}}
{{- $live := include "millrace.live" . | fromJson -}}
{{- if and (eq .root.Values.autoscaling.kind "none") (include "millrace.replicasOwners" $live | fromJson).scalers -}}
{{- $wanted := toString .config.replicas -}}
{{- if and (ne $wanted (dig "metadata" "annotations" "millrace/replicas" "" $live)) (ne $wanted (dig "spec" "replicas" 0 $live | toString)) -}}
{{- $wanted -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "millrace.afterUpgrade" -}}
helm.sh/hook: post-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
