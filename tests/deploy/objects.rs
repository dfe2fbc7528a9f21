//! Objects: Kubernetes manifests as values, and what one of them says of another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Map, Value};

use crate::schema::text;

/// The objects of one file or one rendered chart: what is applied together.
pub struct Objects {
    /// For messages.
    pub name: String,
    pub list: Vec<Value>,
}

impl Objects {
    pub fn read(path: &Path) -> Objects {
        let whole = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let documents = Yaml::load_from_str(&whole).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let list = documents.iter().map(json).filter(|object| !object.is_null()).collect();
        Objects { name: path.file_name().expect("a file").to_string_lossy().into_owned(), list }
    }

    pub fn of(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.list.iter().filter(move |object| object["kind"] == kind)
    }

    pub fn named(&self, kind: &str, name: &str) -> Option<&Value> {
        self.list.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
    }
}

/// A pod template, with what belongs to it.
pub struct Pod<'a> {
    pub deployment: &'a Value,
    pub template: &'a Value,
}

impl<'a> Pod<'a> {
    pub fn all(objects: &'a Objects) -> Vec<Pod<'a>> {
        objects
            .of("Deployment")
            .map(|deployment| Pod { deployment, template: &deployment["spec"]["template"] })
            .collect()
    }

    pub fn spec(&self) -> &'a Value {
        &self.template["spec"]
    }

    pub fn name(&self) -> &'a str {
        text(&self.deployment["metadata"]["name"])
    }

    pub fn containers(&self) -> Vec<&'a Value> {
        let list = |name: &str| self.spec()[name].as_array().into_iter().flatten();
        list("initContainers").chain(list("containers")).collect()
    }

    pub fn container(&self, name: &str) -> Option<&'a Value> {
        self.containers().into_iter().find(|container| container["name"] == name)
    }

    /// The named ports of all containers.
    pub fn ports(&self) -> BTreeMap<&'a str, u64> {
        let ports =
            self.containers().into_iter().flat_map(|container| container["ports"].as_array().into_iter().flatten());
        ports.map(|port| (text(&port["name"]), port["containerPort"].as_u64().expect("a number"))).collect()
    }

    pub fn has_labels(&self, labels: &Value) -> bool {
        labels.as_object().is_some_and(|labels| {
            !labels.is_empty()
                && labels.iter().all(|(name, value)| self.template["metadata"]["labels"].get(name) == Some(value))
        })
    }

    /// The values of the container's environment.
    pub fn environment(&self, container: &'a Value) -> BTreeMap<String, String> {
        let entries = container["env"].as_array().into_iter().flatten();
        entries.map(|entry| (text(&entry["name"]).to_owned(), text(&entry["value"]).to_owned())).collect()
    }

    /// The files under this mount path: from where they come (`configMap/NAME` or `secret/NAME`) and the path there.
    pub fn projected_files(&self, mount_path: &str) -> Vec<(String, Option<String>)> {
        let longhaul = self.container("longhaul").expect("a longhaul container");
        let mounts = longhaul["volumeMounts"].as_array().into_iter().flatten();
        let Some(mount) = mounts.into_iter().find(|mount| mount["mountPath"] == mount_path) else { return Vec::new() };
        let mut volumes = self.spec()["volumes"].as_array().into_iter().flatten();
        let volume = volumes.find(|volume| volume["name"] == mount["name"]).expect("the mounted volume is there");
        let mut files = Vec::new();
        for source in volume["projected"]["sources"].as_array().expect("a projected volume") {
            if let Some(map) = source.get("configMap") {
                files.push((format!("configMap/{}", text(&map["name"])), None));
            }
            if let Some(secret) = source.get("secret") {
                for item in secret["items"].as_array().expect("items of the secret") {
                    files.push((format!("secret/{}", text(&secret["name"])), Some(text(&item["path"]).to_owned())));
                }
            }
        }
        files
    }
}

/// Every file with this ending in the directory, sorted.
pub fn files_in(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.to_string_lossy().ends_with(ending));
    paths.sort();
    paths
}

fn json(node: &Yaml) -> Value {
    match node {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(value)) => Value::Bool(*value),
        Yaml::Value(Scalar::Integer(value)) => Value::from(*value),
        Yaml::Value(Scalar::FloatingPoint(value)) => Value::from(value.into_inner()),
        Yaml::Value(Scalar::String(value)) => Value::from(value.as_ref()),
        Yaml::Sequence(items) => items.iter().map(json).collect(),
        Yaml::Mapping(entries) => {
            let pairs =
                entries.iter().map(|(key, value)| (key.as_str().expect("a key is text").to_owned(), json(value)));
            Value::Object(pairs.collect::<Map<String, Value>>())
        }
        other => panic!("neither a value, a list nor a mapping: {other:?}"),
    }
}
