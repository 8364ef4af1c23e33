-- Prelude: `consumer_group` returns the fields of a consumer group by name, or nil where there is none yet.
-- KEYS: stream, ...
-- ARGV: consumer group, ...
local function consumer_group()
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
  for _, fields in ipairs(groups.err and {} or groups) do
    local found = {}
    for i = 1, #fields, 2 do found[fields[i]] = fields[i + 1] end
    if found['name'] == ARGV[1] then return found end
  end
end
