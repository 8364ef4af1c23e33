// Validates objects of other APIs than Kubernetes's own against the schemas of their CustomResourceDefinitions.
// Argument: the directory with node_modules. Input: a JSON list of objects. Output: a JSON list of complaints.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const KINDS = {
  ScaledObject: "keda/keda.sh/v1alpha1",
  TriggerAuthentication: "keda/keda.sh/v1alpha1",
  PodMonitor: "prometheus-operator/monitoring.coreos.com/v1",
  PrometheusRule: "prometheus-operator/monitoring.coreos.com/v1",
  HTTPRoute: "gateway-api/gateway.networking.k8s.io/v1",
};

const complaints = [];
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${object.kind} ${object.metadata.name}`;
  const path = `${process.argv[2]}/node_modules/@kubernetes-models/${KINDS[object.kind]}/${object.kind}.js`;
  const Model = (await import(pathToFileURL(path)))[object.kind];
  try {
    new Model(object).validate();
  } catch (error) {
    complaints.push(`${name}: ${error.message}`);
  }
}
console.log(JSON.stringify(complaints));
