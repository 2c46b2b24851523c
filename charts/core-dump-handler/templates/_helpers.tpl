{{- define "labels" -}}
app.kubernetes.io/part-of: core-dump-handler
{{- end }}
{{- define "selector" -}}
app.kubernetes.io/name: {{ .Values.fullnameOverride }}
{{- end }}
{{- define "image" -}}
{{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}
{{- define "directory" -}}
{{ .Values.directory | default (hasPrefix "bottlerocket-" .Values.nodes | ternary "/var/core_dumps" "/core_dumps") }}
{{- end }}
{{- define "template" -}}
{{ .Values.keyTemplate | default (has .Values.nodes (list "bottlerocket-dd" "bottlerocket-file") | ternary "dumps/{date}/{node}/{name}" "dumps/{date}/{namespace}/{pod}/{node}/{name}") }}
{{- end }}
{{- define "helper.conf" -}}
{{ range $key, $value := merge (dict "WATCH_DIR" "/var/core_dumps" "PYTHON_PATH" "/usr/share/core-dump-handler/site-packages") .Values.helper -}}
{{ $key }}={{ $value }}
{{ end }}
{{- end }}
{{- define "settings" -}}
{{ $moved := dict -}}
{{ with .Values.directory }}{{ $moved = dict "WATCH_DIR" . }}{{ end -}}
{{ merge $moved (dict "BUCKET_NAME" .Values.bucket "AWS_REGION" .Values.region "KEY_TEMPLATE" (include "template" .)) .Values.settings (dict "SHUTDOWN_SECONDS" "90") | toYaml }}
{{- end }}
