// Renders chats with a TEMPLATE as Ollama 0.30 and newer does, for tests/test_gguf.py.
//
// Ollama itself is not to be had from a package registry, and its template engine is Go's own.  What is Ollama's is
// stated here anew, from reading its sources: the shapes a template sees (maps, so sorted keys), the function
// json, how messages of one role are joined, and how the tags of thinking and of calls are taken from a template.
//
// stdin: {"template": "...", "chats": [{"messages": [...], "tools": [...], "think": false}]}, in the shapes of
// /api/chat.  stdout: {"prompts": [...], "thinking": ["<think>", "</think>"], "tag": "..."}.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type toolCall struct {
	Function struct {
		Name      string
		Arguments map[string]any
	}
}

type message struct {
	Role      string
	Content   string
	Thinking  string
	ToolCalls []toolCall `json:"tool_calls"`
	ToolName  string     `json:"tool_name"`
}

type tool struct {
	Type     string
	Function struct {
		Name        string
		Description string
		Parameters  struct {
			Type       string
			Required   []string
			Properties map[string]any
		}
	}
}

type chat struct {
	Messages []*message
	Tools    []tool
	Think    bool
}

type answer struct {
	Prompts  []string  `json:"prompts"`
	Thinking [2]string `json:"thinking"`
	Tag      string    `json:"tag"`
}

func joined(messages []*message) (system string, kept []*message) {
	var systems []string
	for _, m := range messages {
		if m.Role == "system" {
			systems = append(systems, m.Content)
		}
		if last := len(kept) - 1; last >= 0 && kept[last].Role == m.Role && m.Role != "tool" {
			kept[last].Content += "\n\n" + m.Content
		} else {
			kept = append(kept, m)
		}
	}
	return strings.Join(systems, "\n\n"), kept
}

func mentions(pipe *parse.PipeNode, field string) bool {
	for _, command := range pipe.Cmds {
		for _, argument := range command.Args {
			if f, ok := argument.(*parse.FieldNode); ok && f.Ident[0] == field {
				return true
			}
		}
	}
	return false
}

func text(node parse.Node) string {
	if t, ok := node.(*parse.TextNode); ok {
		return strings.TrimSpace(string(t.Text))
	}
	return ""
}

// The first text below the first condition on .ToolCalls, and the two ends of the list that shows .Thinking.
func tags(list *parse.ListNode, found *answer) {
	if list == nil {
		return
	}
	for _, node := range list.Nodes {
		var branch *parse.BranchNode
		switch n := node.(type) {
		case *parse.IfNode:
			branch = &n.BranchNode
			if found.Tag == "" && mentions(n.Pipe, "ToolCalls") {
				found.Tag = strings.Split(text(n.List.Nodes[0]), "{")[0]
			}
		case *parse.RangeNode:
			branch = &n.BranchNode
		case *parse.WithNode:
			branch = &n.BranchNode
		case *parse.ActionNode:
			if mentions(n.Pipe, "Thinking") {
				found.Thinking = [2]string{text(list.Nodes[0]), text(list.Nodes[len(list.Nodes)-1])}
			}
		}
		if branch != nil {
			tags(branch.List, found)
			tags(branch.ElseList, found)
		}
	}
}

func main() {
	var asked struct {
		Template string
		Chats    []chat
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		log.Fatal(err)
	}
	functions := template.FuncMap{"json": func(value any) string {
		written, _ := json.Marshal(value)
		return string(written)
	}}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(asked.Template)
	if err != nil {
		log.Fatal(err)
	}
	found := answer{Prompts: []string{}}
	tags(parsed.Root, &found)
	for _, each := range asked.Chats {
		system, messages := joined(each.Messages)
		var prompt strings.Builder
		if err := parsed.Execute(&prompt, map[string]any{
			"System": system, "Messages": messages, "Tools": each.Tools,
			"Response": "", "Think": each.Think, "IsThinkSet": true,
		}); err != nil {
			log.Fatal(err)
		}
		found.Prompts = append(found.Prompts, prompt.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		log.Fatal(err)
	}
}
