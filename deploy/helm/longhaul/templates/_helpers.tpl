{{- define "longhaul.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "longhaul.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "longhaul.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "longhaul.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "longhaul.selectorLabels" -}}
app.kubernetes.io/name: {{ include "longhaul.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "longhaul.labels" -}}
{{ include "longhaul.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "longhaul.serviceAccountName" -}}
{{- default (include "longhaul.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "longhaul.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* Seconds from SIGTERM to the end at the longest: what is left at the timeout is cut within a tenth of it. */}}
{{- define "longhaul.drainSeconds" -}}
{{- $timeout := int64 .Values.shutdown.timeoutSeconds -}}
{{- add (int64 .Values.shutdown.delaySeconds) $timeout (div (add $timeout 9) 10) 5 -}}
{{- end -}}

{{- define "longhaul.graceSeconds" -}}
{{- $own := int64 (include "longhaul.drainSeconds" .) -}}
{{- if eq .Values.mode "sidecar" -}}
{{- add $own (int64 .Values.sidecar.agent.stopSeconds) -}}
{{- else -}}
{{- $own -}}
{{- end -}}
{{- end -}}

{{/* Not empty where the pods ask the API server. */}}
{{- define "longhaul.asksApiServer" -}}
{{- if or .Values.discovery.enabled .Values.externalMetrics.enabled .Values.podDeletionCost.enabled -}}true{{- end -}}
{{- end -}}

{{- define "longhaul.adminAddress" -}}
{{- if eq .Values.mode "sidecar" -}}
unix:/run/longhaul/admin.sock
{{- else -}}
127.0.0.1:9901
{{- end -}}
{{- end -}}

{{/* The whole longhaul.yaml. */}}
{{- define "longhaul.config" -}}
{{- range $key := list "admin" "shutdown" "kubernetes" -}}
{{- if hasKey $.Values.config $key -}}
{{- fail (printf "config.%s is written by the chart: leave it out, and set the values for it instead" $key) -}}
{{- end -}}
{{- end -}}
{{- $probes := dict "address" (printf "%s:9900" .Values.bindAddress) -}}
{{- $admin := dict "address" (include "longhaul.adminAddress" .) "probes" $probes -}}
{{- $shutdown := dict "delay" (printf "%ds" (int64 .Values.shutdown.delaySeconds)) "timeout" (printf "%ds" (int64 .Values.shutdown.timeoutSeconds)) -}}
{{- $kubernetes := dict -}}
{{- $replicas := dict "dns" (printf "%s-headless.%s.svc" (include "longhaul.fullname" .) .Release.Namespace) "port" 9900 -}}
{{- if .Values.externalMetrics.enabled -}}
{{- $tls := dict "cert_file" "external-metrics/tls.crt" "key_file" "external-metrics/tls.key" -}}
{{- $_ := set $kubernetes "external_metrics" (dict "address" (printf "%s:%d" .Values.bindAddress (int64 .Values.externalMetrics.port)) "tls" $tls "replicas" $replicas) -}}
{{- end -}}
{{- if .Values.keda.enabled -}}
{{- $keda := dict "address" (printf "%s:%d" .Values.bindAddress (int64 .Values.keda.port)) -}}
{{- if not .Values.externalMetrics.enabled -}}
{{- $_ := set $keda "replicas" $replicas -}}
{{- end -}}
{{- $_ := set $kubernetes "keda" $keda -}}
{{- end -}}
{{- if .Values.podDeletionCost.enabled -}}
{{- $_ := set $kubernetes "pod_deletion_cost" true -}}
{{- $_ := set $kubernetes "leader_election" (dict "namespace" .Release.Namespace "name" (include "longhaul.fullname" .)) -}}
{{- end -}}
{{- $whole := merge (dict "admin" $admin "shutdown" $shutdown) .Values.config -}}
{{- if $kubernetes -}}
{{- $_ := set $whole "kubernetes" $kubernetes -}}
{{- end -}}
{{- toYaml $whole -}}
{{- end -}}

{{/* The longhaul container, without its place: `containers` in front, `initContainers` as a native sidecar. */}}
{{- define "longhaul.container" -}}
name: longhaul
image: {{ include "longhaul.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [run, -c, /etc/longhaul/longhaul.yaml]
{{- if eq .Values.mode "sidecar" }}
restartPolicy: Always
{{- end }}
env:
  # terminationGracePeriodSeconds again: no other way leads into the process. It warns where its drain may take longer.
  - name: LONGHAUL_TERMINATION_GRACE_PERIOD
    value: {{ printf "%ss" (include "longhaul.graceSeconds" .) | quote }}
{{- with .Values.extraEnv }}
{{- toYaml . | nindent 2 }}
{{- end }}
ports:
{{- range .Values.service.ports }}
  - {name: {{ .name }}, containerPort: {{ .containerPort }}}
{{- end }}
  - {name: probes, containerPort: 9900}
{{- if .Values.externalMetrics.enabled }}
  - {name: external, containerPort: {{ .Values.externalMetrics.port }}}
{{- end }}
{{- if .Values.keda.enabled }}
  - {name: keda, containerPort: {{ .Values.keda.port }}}
{{- end }}
startupProbe:
  # Before the agent beside it is started: it must not wait for the agent.
  httpGet: {path: /readyz, port: probes}
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: probes}
  periodSeconds: 10
  timeoutSeconds: 5
readinessProbe:
  httpGet:
    path: {{ if eq .Values.mode "sidecar" }}{{ printf "/readyz?service=%s" .Values.sidecar.agent.service | quote }}{{ else }}/readyz{{ end }}
    port: probes
  periodSeconds: 2
  failureThreshold: 1
{{- if and (eq .Values.mode "sidecar") .Values.sidecar.drainFirst }}
lifecycle:
  preStop:
    # Hooks of all containers run at once, when the pod is told to end: so the drain begins before the agent is stopped, and
    # not after it, as SIGTERM does in a sidecar.
    exec:
      command: [/usr/local/bin/longhaul, drain, --admin, "unix:/run/longhaul/admin.sock"]
{{- end }}
resources:
{{- toYaml .Values.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: config, mountPath: /etc/longhaul, readOnly: true}
  # Only here: whoever reaches the admin socket rules the proxy, and the agent beside it runs tools.
  - {name: run, mountPath: /run/longhaul}
{{- end -}}
