// Makes a folder of the node for each PersistentVolumeClaim of the cluster's storage class, and removes it with its volume.
// It runs on the cluster's one node, so no pod has to be started for either.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "how to reach the API server")
	name := flag.String("provisioner", "", "what the storage class calls this provisioner")
	node := flag.String("node", "", "the name of the node that this runs on")
	folder := flag.String("folder", "", "where the volumes lie")
	flag.Parse()
	stopping, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(stopping, *kubeconfig, *name, folders{node: *node, root: *folder}); err != nil {
		fmt.Fprintf(os.Stderr, "volumes: %v\n", err)
		os.Exit(1)
	}
}

func run(stopping context.Context, kubeconfig, name string, volumes folders) error {
	access, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	access.QPS, access.Burst = 50, 100 // tests make a hundred claims at once
	client, err := kubernetes.NewForConfig(access)
	if err != nil {
		return err
	}
	pauses := workqueue.NewTypedItemExponentialFailureRateLimiter[string](time.Second, 30*time.Second)
	controller.NewProvisionController(stopping, client, name, volumes,
		controller.LeaderElection(false), controller.RateLimiter(pauses)).Run(stopping)
	return nil
}

type folders struct {
	node string
	root string
}

// Provision makes the folder. What cannot be had here ends in an Event on the claim.
func (f folders) Provision(_ context.Context, options controller.ProvisionOptions) (*v1.PersistentVolume, controller.ProvisioningState, error) {
	claim := options.PVC.Spec
	if err := check(claim); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	folder := filepath.Join(f.root, options.PVName)
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	if err := os.Chmod(folder, 0o777); err != nil { // whatever the umask; a pod's user can be anyone
		return nil, controller.ProvisioningFinished, err
	}
	kind := v1.HostPathDirectory
	volume := &v1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: options.PVName},
		Spec: v1.PersistentVolumeSpec{
			AccessModes:                   claim.AccessModes,
			Capacity:                      v1.ResourceList{v1.ResourceStorage: claim.Resources.Requests[v1.ResourceStorage]},
			MountOptions:                  options.StorageClass.MountOptions,
			NodeAffinity:                  on(f.node),
			PersistentVolumeReclaimPolicy: *options.StorageClass.ReclaimPolicy,
			PersistentVolumeSource:        v1.PersistentVolumeSource{HostPath: &v1.HostPathVolumeSource{Path: folder, Type: &kind}},
			VolumeMode:                    claim.VolumeMode,
		},
	}
	return volume, controller.ProvisioningFinished, nil
}

// Delete removes the folder, with all that is in it.
func (f folders) Delete(_ context.Context, volume *v1.PersistentVolume) error {
	return os.RemoveAll(filepath.Join(f.root, volume.Name))
}

func check(claim v1.PersistentVolumeClaimSpec) error {
	if claim.VolumeMode != nil && *claim.VolumeMode == v1.PersistentVolumeBlock {
		return errors.New("volumeMode Block: a volume of this cluster is a folder; leave volumeMode out")
	}
	if claim.Selector != nil {
		return errors.New("selector: a volume of this cluster is made for its claim; leave selector out")
	}
	for _, mode := range claim.AccessModes {
		if mode != v1.ReadWriteOnce && mode != v1.ReadWriteOncePod {
			return fmt.Errorf("accessModes %s: this cluster has ReadWriteOnce and ReadWriteOncePod only", mode)
		}
	}
	return nil
}

func on(node string) *v1.VolumeNodeAffinity {
	return &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{
		MatchExpressions: []v1.NodeSelectorRequirement{
			{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpIn, Values: []string{node}},
		},
	}}}}
}
