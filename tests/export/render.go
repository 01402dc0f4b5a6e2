// Renders a template of Ollama's kind on conversations, with Go's own text/template: what Ollama itself uses.
// Reads {"template": ..., "cases": [{"System": ..., "Messages": [{"Role": ..., "Content": ...}]}]} and writes a list.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type conversation struct {
	System   string
	Messages []message
}

func main() {
	var asked []struct {
		Template string
		Cases    []conversation
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	rendered := [][]string{}
	for _, one := range asked {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		texts := []string{}
		for _, conversation := range one.Cases {
			var text strings.Builder
			fields := map[string]any{"System": conversation.System, "Messages": conversation.Messages, "Response": ""}
			if err := parsed.Execute(&text, fields); err != nil {
				panic(err)
			}
			texts = append(texts, text.String())
		}
		rendered = append(rendered, texts)
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
